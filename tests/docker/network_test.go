package docker

import (
	"context"
	"net"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// serve is the script of a web server on port 8080.
const serve = "mkdir /srv; echo web > /srv/index.html; exec httpd -f -p 8080 -h /srv"

// fetch prints a page in a container, as soon as it is served.
func fetch(url string) string {
	return "for i in $(seq 100); do wget -q -O - " + url + " && exit; sleep 0.2; done; exit 1"
}

// testDefaultNetwork is Docker's bridge: names come from the host's name
// servers, ports are published.
func testDefaultNetwork(d docker) {
	d.run("-d", "--name", "web", "-p", "18080:8080", busybox, "sh", "-c", serve)
	d.keep("web")
	address := d.docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "web")
	if got := d.run("--rm", busybox, "sh", "-c", fetch("http://"+address+":8080/")); got != "web" {
		d.Errorf("page from another container = %q; want web", got)
	}
	// Through docker-proxy, and through the packet filter's translation.
	for _, host := range []string{"127.0.0.1", "172.17.0.1"} {
		out, err := d.env.Command(d.ctx, "sh", "-c", "busybox wget -q -O - http://"+host+":18080/").Run()
		if err != nil || out != "web\n" {
			d.Errorf("page at the published port of %s = %q, %v; want web", host, out, err)
		}
	}
	if got := d.docker("exec", "web", "ip", "-4", "-o", "addr", "show", "dev", "eth0"); !strings.Contains(got, address+"/16") {
		d.Errorf("eth0 of the container = %q; want %s", got, address)
	}
	if got := d.docker("exec", "web", "cat", "/etc/hosts"); !strings.Contains(got, address) {
		d.Errorf("/etc/hosts = %q; want %s in it", got, address)
	}
}

// testNetworks is about networks that a user has made.
func testNetworks(d docker) {
	for _, name := range []string{"one", "two"} {
		d.docker("network", "create", name)
		d.after("network", "rm", name)
	}
	d.docker("run", "-d", "--runtime", "runc", "--name", "neighbour", "--network", "two", busybox, "sh", "-c", serve)
	d.keep("neighbour")
	d.docker("create", "--runtime", runtimeName, "--name", "both", "--network", "one", busybox, "sh", "-c", serve)
	d.keep("both")
	d.docker("network", "connect", "two", "both")
	d.docker("start", "both")

	// Which of them is eth0 is Docker's to say.
	pid := d.docker("inspect", "-f", "{{.State.Pid}}", "both")
	for _, device := range []string{"eth0", "eth1"} {
		show := []string{"ip", "-4", "-o", "addr", "show", "dev", device}
		out, err := d.env.Command(d.ctx, "nsenter", append([]string{"-t", pid, "-n", "busybox"}, show...)...).Run()
		if err != nil {
			d.Fatal(err)
		}
		_, want, _ := strings.Cut(strings.TrimSpace(out), ": ") // without the number
		if got := d.docker(append([]string{"exec", "both"}, show...)...); !strings.HasSuffix(got, want) {
			d.Errorf("%s of the container = %q; want as on the host: %q", device, got, want)
		}
	}
	for _, network := range []string{"one", "two"} {
		address := d.docker("inspect", "-f", "{{.NetworkSettings.Networks."+network+".IPAddress}}", "both")
		if got := d.docker("exec", "both", "ip", "-4", "-o", "addr"); !strings.Contains(got, " "+address+"/16 ") {
			d.Errorf("addresses of the container = %q; want %s, of network %s", got, address, network)
		}
	}
	address := d.docker("inspect", "-f", "{{.NetworkSettings.Networks.two.IPAddress}}", "neighbour")
	if got := d.docker("exec", "both", "sh", "-c", fetch("http://"+address+":8080/")); got != "web" {
		d.Errorf("page of the neighbour = %q; want web", got)
	}
	if got := d.docker("exec", "neighbour", "sh", "-c", fetch("http://both:8080/")); got != "web" {
		d.Errorf("page for the neighbour, by name = %q; want web", got)
	}
}

// testOtherNetworks is about none of its own.
func testOtherNetworks(d docker) {
	links := d.run("--rm", "--network", "none", busybox, "ls", "/sys/class/net")
	if links != "lo" {
		d.Errorf("interfaces without a network = %q; want lo", links)
	}

	// The host's: what listens there is reached.
	l, err := d.env.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		d.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.SetDeadline(time.Now().Add(patience))
			c.Write([]byte("host\n"))
			c.Close()
		}
	}()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		d.Fatal(err)
	}
	if got := d.run("--rm", "--network", "host", busybox, "nc", "127.0.0.1", port); got != "host" {
		d.Errorf("what listens on the host says %q; want host", got)
	}

	// Another container's: two virtual machines cannot share one; with a
	// container of runc's it is as usual.
	d.run("-d", "--name", "owner", busybox, "sleep", "1000")
	d.docker("run", "-d", "--runtime", "runc", "--name", "plain", busybox, "sleep", "1000")
	d.keep("owner", "plain")
	d.fails(125, "two virtual machines cannot share one", "run", "--rm", "--runtime", runtimeName, "--network", "container:owner", busybox, "true")
	if got := d.docker("exec", "owner", "echo", "alive"); got != "alive" {
		d.Errorf("the other container then says %q; want it alive", got)
	}
	address := d.docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "plain")
	got := d.run("--rm", "--network", "container:plain", busybox, "ip", "-4", "-o", "addr", "show", "dev", "eth0")
	if !strings.Contains(got, address+"/16") {
		d.Errorf("eth0 in the network of a container of runc's = %q; want %s", got, address)
	}
}

// testTooManyNetworks has one more than late_interfaces: an error that says so,
// from which the container recovers.
func testTooManyNetworks(d docker) {
	d.docker("create", "--runtime", runtimeName, "--name", "many", "--network", "a", busybox, "sleep", "1000")
	for _, name := range []string{"a", "b", "c"} {
		d.docker("network", "create", name)
		d.after("network", "rm", name)
		if name != "a" {
			d.docker("network", "connect", name, "many")
		}
	}
	d.keep("many")
	d.fails(1, "interface eth2 has arrived after the virtual machine was started with 2 spare network devices", "start", "many")
	d.docker("network", "disconnect", "c", "many")
	d.docker("start", "many")
	if got := d.docker("exec", "many", "ls", "/sys/class/net"); got != "eth0\neth1\nlo" {
		d.Errorf("interfaces with two networks = %q; want eth0, eth1 and lo", got)
	}
}

// testNames has a container ask the name server that Docker runs for each
// network of a user's, at 127.0.0.11, and by way of it one outside.
func testNames(d docker) {
	outside := nameServer(d)
	d.docker("network", "create", "names")
	d.after("network", "rm", "names")
	d.docker("run", "-d", "--runtime", "runc", "--name", "neighbour", "--network", "names", busybox, "sleep", "1000")
	d.keep("neighbour")
	d.run("-d", "--name", "asker", "--network", "names", "--dns", outside, busybox, "sleep", "1000")
	d.keep("asker")
	if got := d.docker("exec", "asker", "cat", "/etc/resolv.conf"); !strings.Contains(got, "nameserver 127.0.0.11") {
		d.Fatalf("/etc/resolv.conf = %q; want Docker's own name server", got)
	}
	address := d.docker("inspect", "-f", "{{.NetworkSettings.Networks.names.IPAddress}}", "neighbour")
	for name, want := range map[string]string{"neighbour": address, outsideName: outsideAddress} {
		if got := d.docker("exec", "asker", "nslookup", "-type=a", name); !strings.Contains(got, "Address: "+want) {
			d.Errorf("nslookup %s = %q; want %s", name, got, want)
		}
	}
	d.fails(1, "NXDOMAIN", "exec", "asker", "nslookup", "-type=a", "nobody."+outsideName)

	// By TCP, a query behind its length.
	query := question(d, "neighbour.")
	cmd := d.env.Docker(d.ctx, "exec", "-i", "asker", "nc", "-w", "30", "127.0.0.11", "53")
	cmd.Stdin = strings.NewReader(string([]byte{byte(len(query) >> 8), byte(len(query))}) + string(query))
	out, err := cmd.Run()
	if err != nil {
		d.Fatal(err)
	}
	var answer dnsmessage.Message
	if len(out) < 2 || answer.Unpack([]byte(out[2:])) != nil || len(answer.Answers) != 1 {
		d.Fatalf("answer by TCP = %q; want one address", out)
	}
	if a, ok := answer.Answers[0].Body.(*dnsmessage.AResource); !ok || net.IP(a.A[:]).String() != address {
		d.Errorf("answer by TCP = %v; want %s", answer.Answers[0], address)
	}
}

// What nameServer knows.
const (
	outsideName    = "outside.example"
	outsideAddress = "192.0.2.7"
)

// nameServer is one outside, on the host of the containers. It returns its
// address.
func nameServer(d docker) string {
	const address = "198.51.100.53"
	const prefix = address + "/32"
	if _, err := d.env.Command(d.ctx, "ip", "address", "add", prefix, "dev", "lo").Run(); err != nil {
		d.Fatal(err)
	}
	c, err := d.env.ListenPacket("udp4", address+":53")
	if err != nil {
		d.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b := make([]byte, 1500)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response, m.Additionals = true, nil
			switch q := m.Questions[0]; {
			case q.Name.String() != outsideName+".":
				m.RCode = dnsmessage.RCodeNameError
			case q.Type == dnsmessage.TypeA:
				m.Answers = []dnsmessage.Resource{{
					Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1},
					Body:   &dnsmessage.AResource{A: [4]byte(net.ParseIP(outsideAddress).To4())},
				}}
			}
			if answer, err := m.Pack(); err == nil {
				c.WriteTo(answer, from)
			}
		}
	}()
	d.Cleanup(func() {
		c.Close()
		<-ended
		if _, err := d.env.Command(context.Background(), "ip", "address", "del", prefix, "dev", "lo").Run(); err != nil {
			d.Error(err)
		}
	})
	return address
}

// question is a query for a name's IPv4 address.
func question(d docker, name string) []byte {
	d.Helper()
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 1, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := m.Pack()
	if err != nil {
		d.Fatal(err)
	}
	return b
}
