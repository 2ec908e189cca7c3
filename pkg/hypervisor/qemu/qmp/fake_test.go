package qmp_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "fake"}, "capabilities": ["oob"]}}`

// fakeVMM is the server's side of QMP on a unix socket, as strict as QEMU: it
// refuses commands before qmp_capabilities, answers in order and echoes ids.
type fakeVMM struct {
	t    *testing.T
	conn *net.UnixConn
	in   *bufio.Reader

	mu    sync.Mutex
	files []*os.File // guarded by mu; received with SCM_RIGHTS, not yet taken
}

type fakeRequest struct {
	Execute   string
	Arguments json.RawMessage
	ID        json.RawMessage
}

// listen returns the client's connection to a fake, which runs serve.
func listen(t *testing.T, serve func(*fakeVMM)) net.Conn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeVMM{t: t, conn: server}
	f.in = bufio.NewReader(f)
	served := make(chan struct{})
	go func() {
		defer close(served)
		serve(f)
	}()
	t.Cleanup(func() {
		conn.Close()
		server.Close()
		select {
		case <-served:
		case <-time.After(10 * time.Second):
			t.Error("the fake VMM does not end")
		}
		for _, file := range f.files {
			file.Close()
		}
	})
	return conn
}

// Read implements io.Reader and keeps the descriptors that come along.
func (f *fakeVMM) Read(b []byte) (int, error) {
	oob := make([]byte, syscall.CmsgSpace(4*16))
	n, oobn, _, _, err := f.conn.ReadMsgUnix(b, oob)
	if messages, perr := syscall.ParseSocketControlMessage(oob[:oobn]); perr == nil {
		for _, m := range messages {
			fds, _ := syscall.ParseUnixRights(&m)
			f.mu.Lock()
			for _, fd := range fds {
				f.files = append(f.files, os.NewFile(uintptr(fd), "passed"))
			}
			f.mu.Unlock()
		}
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	return max(n, 0), err
}

func (f *fakeVMM) takeFile() *os.File {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.files) == 0 {
		return nil
	}
	file := f.files[0]
	f.files = f.files[1:]
	return file
}

func (f *fakeVMM) send(format string, args ...any) {
	// The client may be gone: tests judge by what it saw.
	_, _ = fmt.Fprintf(f.conn, format+"\r\n", args...)
}

// next reads a request; nil at the connection's end.
func (f *fakeVMM) next() *fakeRequest {
	line, err := f.in.ReadBytes('\n')
	if err != nil {
		return nil
	}
	var r fakeRequest
	if err := json.Unmarshal(line, &r); err != nil {
		f.send(`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`)
		return &fakeRequest{}
	}
	return &r
}

func (f *fakeVMM) answer(r *fakeRequest, result string) {
	f.send(`{"return": %s, "id": %s}`, result, r.ID)
}

func (f *fakeVMM) fail(r *fakeRequest, class, desc string) {
	f.send(`{"error": {"class": %q, "desc": %q}, "id": %s}`, class, desc, r.ID)
}

// handshake greets and waits for the end of the negotiation.
func (f *fakeVMM) handshake() {
	f.send(greeting)
	for {
		switch r := f.next(); {
		case r == nil:
			return
		case r.Execute == "qmp_capabilities":
			f.answer(r, "{}")
			return
		default:
			f.fail(r, "CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
		}
	}
}

// serve answers commands by their handlers; "echo" returns its arguments.
func (f *fakeVMM) serve(handlers map[string]func(r *fakeRequest)) {
	f.handshake()
	for r := f.next(); r != nil; r = f.next() {
		if h := handlers[r.Execute]; h != nil {
			h(r)
			continue
		}
		if r.Execute == "echo" {
			f.answer(r, string(r.Arguments))
			continue
		}
		f.fail(r, "CommandNotFound", "The command "+r.Execute+" has not been found")
	}
}
