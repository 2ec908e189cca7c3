// Command loopback serves TCP addresses for tests: each echoes, or resets its
// connections after the first byte. It says "ready" once all of them listen.
//
//	loopback echo|reset ADDRESS...
package main

import (
	"fmt"
	"io"
	"net"
	"os"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "loopback:", err)
		os.Exit(1)
	}
}

func run(mode string, addresses []string) error {
	serve := echo
	if mode == "reset" {
		serve = reset
	}
	failed := make(chan error)
	for _, a := range addresses {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go serve(c.(*net.TCPConn))
			}
		}()
	}
	fmt.Println("ready")
	return <-failed
}

func echo(c *net.TCPConn) {
	io.Copy(c, c)
	c.Close()
}

func reset(c *net.TCPConn) {
	io.ReadFull(c, make([]byte, 1))
	c.SetLinger(0)
	c.Close()
}
