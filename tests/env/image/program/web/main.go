// Command web is a web server with one page, for images that stand in for
// those of nginx and httpd. Under the name nginx it also shows the signs by
// which tests know that one: the title "nginx: master process", and its pid in
// /var/run/nginx.pid.
package main

import (
	"flag"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const (
	title   = "nginx: master process nginx"
	pidFile = "/var/run/nginx.pid"
)

func main() {
	log.SetFlags(0)
	address := flag.String("listen", ":80", "`address` to serve at")
	flag.Parse()
	name := filepath.Base(os.Args[0])
	if name == "nginx" {
		self, err := os.Executable()
		if err != nil {
			log.Fatal(err)
		}
		args := append([]string{title}, os.Args[1:]...)
		log.Fatal(syscall.Exec(self, args, os.Environ()))
	}
	if strings.HasPrefix(os.Args[0], title) {
		name = "nginx"
		pid := strconv.Itoa(os.Getpid()) + "\n"
		if err := os.WriteFile(pidFile, []byte(pid), 0o644); err != nil {
			log.Fatal(err)
		}
	}
	log.Printf("%s serves at %s", name, *address)
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.Write([]byte("<title>Welcome to " + name + "</title>\n"))
	})
	log.Fatal(http.ListenAndServe(*address, nil))
}
