package stdio

import (
	"errors"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStdinAfter: a client's open(2) of stdin returns when the process is known,
// and not before; nothing that it then writes is lost, nor is a CloseStdin that
// came first.
func TestStdinAfter(t *testing.T) {
	for _, closeFirst := range []bool{false, true} {
		checkLeaks(t)
		ctx, _ := testContext(t)
		path := makeFIFO(t, "stdin")
		known := make(chan struct{})
		s, err := Open(ctx, Config{ID: "p", Stdin: path, StdinAfter: known})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		conn, guest := connPair(t)
		guest.SetReadDeadline(time.Now().Add(20 * time.Second))
		s.Attach(conn, nil, nil)
		if closeFirst {
			if err := s.CloseStdin(); err != nil {
				t.Fatal(err)
			}
		}
		if f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); !errors.Is(err, unix.ENXIO) {
			f.Close()
			t.Errorf("open stdin before the process is known = %v; want ENXIO", err)
		}
		opened := make(chan *os.File)
		go func() {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				t.Error(err)
			}
			opened <- f
		}()
		close(known)
		client := <-opened
		client.WriteString("hello")
		client.Close()
		readString(t, "stdin", guest, "hello")
		if !closeFirst {
			silent(t, "stdin without a writer", guest)
			if err := s.CloseStdin(); err != nil {
				t.Fatal(err)
			}
		}
		readEnd(t, "stdin", guest)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestStdinNeverKnown: the process fails to come to be.
func TestStdinNeverKnown(t *testing.T) {
	checkLeaks(t)
	ctx, _ := testContext(t)
	s, err := Open(ctx, Config{ID: "p", Stdin: makeFIFO(t, "stdin"), StdinAfter: make(chan struct{})})
	if err != nil {
		t.Fatal(err)
	}
	conn, _ := connPair(t)
	s.Attach(conn, nil, nil)
	if err := s.Close(); err != nil {
		t.Errorf("Close() = %v; want nil", err)
	}
}
