package qmp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/vmrt/vmrt/pkg/hypervisor/qemu/qmp"
)

// timeout bounds what should take milliseconds.
func timeout(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func connect(t *testing.T, handlers func(*fakeVMM) map[string]func(*fakeRequest)) *qmp.Client {
	t.Helper()
	conn := listen(t, func(f *fakeVMM) {
		var h map[string]func(*fakeRequest)
		if handlers != nil {
			h = handlers(f)
		}
		f.serve(h)
	})
	c, err := qmp.Connect(timeout(t), conn)
	if err != nil {
		t.Fatalf("Connect() = %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestHandshake(t *testing.T) {
	c := connect(t, nil)
	want := qmp.Version{Major: 7, Minor: 2, Micro: 22, Package: "fake"}
	if diff := cmp.Diff(want, c.Version()); diff != "" {
		t.Errorf("Version() (-want +got):\n%s", diff)
	}
}

func TestExecute(t *testing.T) {
	c := connect(t, nil)
	type arguments struct {
		S string
		N int
	}
	want := arguments{S: "a\n\"b\" ü", N: 1 << 40}
	var got arguments
	if err := c.Execute(timeout(t), "echo", want, &got); err != nil || got != want {
		t.Errorf("Execute(echo) = %v, result %+v; want nil, %+v", err, got, want)
	}
}

func TestExecuteFault(t *testing.T) {
	c := connect(t, nil)
	err := c.Execute(timeout(t), "no-such-thing", nil, nil)
	var fault *qmp.Error
	if !errors.As(err, &fault) || fault.Class != "CommandNotFound" {
		t.Fatalf("Execute() = %v; want a CommandNotFound error", err)
	}
	if want := "qmp no-such-thing: CommandNotFound: The command no-such-thing has not been found"; err.Error() != want {
		t.Errorf("Execute() = %q; want %q", err, want)
	}
	if err := c.Execute(timeout(t), "echo", map[string]int{}, nil); err != nil {
		t.Errorf("Execute(echo) after a fault = %v; want nil", err)
	}
}

func TestExecuteResultOfAnotherType(t *testing.T) {
	c := connect(t, nil)
	var got []int
	if err := c.Execute(timeout(t), "echo", map[string]int{"a": 1}, &got); err == nil {
		t.Error("Execute() into the wrong type = nil; want an error")
	}
}

func TestConcurrentCallers(t *testing.T) {
	c := connect(t, nil)
	ctx := timeout(t)
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			for j := range 50 {
				want := map[string]string{"v": strings.Repeat(fmt.Sprint(i, "-", j, " "), 1+j)}
				var got map[string]string
				if err := c.Execute(ctx, "echo", want, &got); err != nil || got["v"] != want["v"] {
					t.Errorf("Execute(echo) = %v, result %q; want nil, %q", err, got["v"], want["v"])
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestAnswersOutOfOrder has the second command answered first, as out-of-band
// execution may.
func TestAnswersOutOfOrder(t *testing.T) {
	c := connect(t, func(f *fakeVMM) map[string]func(*fakeRequest) {
		var held *fakeRequest
		return map[string]func(*fakeRequest){"hold": func(r *fakeRequest) {
			if held == nil {
				held = r
				return
			}
			f.answer(r, string(r.Arguments))
			f.answer(held, string(held.Arguments))
		}}
	})
	var wg sync.WaitGroup
	for want := range 2 {
		wg.Go(func() {
			var got map[string]int
			if err := c.Execute(timeout(t), "hold", map[string]int{"n": want}, &got); err != nil || got["n"] != want {
				t.Errorf("Execute(hold) = %v, %v; want nil, %d", err, got, want)
			}
		})
	}
	wg.Wait()
}

func TestTimeoutThenLateAnswer(t *testing.T) {
	release := make(chan struct{})
	c := connect(t, func(f *fakeVMM) map[string]func(*fakeRequest) {
		return map[string]func(*fakeRequest){
			"slow": func(r *fakeRequest) { <-release; f.answer(r, `"late"`) },
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Execute(slow) = %v; want a deadline error", err)
	}
	close(release)
	var got map[string]int
	if err := c.Execute(timeout(t), "echo", map[string]int{"a": 1}, &got); err != nil || got["a"] != 1 {
		t.Errorf("Execute(echo) after a timeout = %v, %v; want nil and its own answer", err, got)
	}
}

// TestPeerThatDoesNotRead fills the socket: a write must end with its context,
// and the client with the line that was cut.
func TestPeerThatDoesNotRead(t *testing.T) {
	release := make(chan struct{})
	conn := listen(t, func(f *fakeVMM) {
		f.handshake()
		<-release
	})
	defer close(release)
	c, err := qmp.Connect(timeout(t), conn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	start := time.Now()
	err = c.Execute(ctx, "big", strings.Repeat("x", 1<<20), nil)
	if err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("Execute() = %v after %v; want an error soon", err, time.Since(start))
	}
	select {
	case <-c.Done():
	case <-time.After(10 * time.Second):
		t.Error("the connection goes on after half a line")
	}
}

func TestWaiterForTheWriteLockEndsWithItsContext(t *testing.T) {
	release := make(chan struct{})
	conn := listen(t, func(f *fakeVMM) {
		f.handshake()
		<-release
	})
	defer close(release)
	c, err := qmp.Connect(timeout(t), conn)
	if err != nil {
		t.Fatal(err)
	}
	blocked := make(chan error, 1)
	go func() { blocked <- c.Execute(context.Background(), "big", strings.Repeat("x", 1<<20), nil) }()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := c.Execute(ctx, "small", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Execute(small) = %v; want a deadline error", err)
	}
	c.Close()
	if err := <-blocked; !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Execute(big) after Close = %v; want ErrClosed", err)
	}
}

func TestMalformedInput(t *testing.T) {
	tests := map[string]struct {
		send string
		want string
	}{
		"garbage":              {"\x00\xff\xfe not json\n", "malformed message"},
		"not an object":        {"[1,2,3]\n", "malformed message"},
		"empty object":         {"{}\n", "not one of greeting, answer and event"},
		"answer and event":     {`{"return": {}, "event": "X", "id": 1}` + "\n", "not one of"},
		"answer without id":    {`{"return": {}}` + "\n", "without an id"},
		"id of a strange type": {`{"return": {}, "id": {"a": 1}}` + "\n", "malformed message"},
		"second greeting":      {greeting + "\n" + greeting + "\n", "second greeting"},
		"error without id":     {`{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n", "JSON parse error"},
		"event with much data": {`{"event": "X", "data": "` + strings.Repeat("x", 64<<10) + `"}` + "\n", "at most 32768"},
		"endless line":         {strings.Repeat("x", 3<<20), "longer than 1048576 bytes"},
		"deep nesting":         {`{"return": ` + strings.Repeat("[", 100_000) + "\n", "malformed message"},
		"early end":            {`{"return": {`, "malformed message"},
		"end":                  {"", "closed the connection"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			conn := listen(t, func(f *fakeVMM) {
				f.handshake()
				f.next()
				_, _ = io.WriteString(f.conn, tt.send)
				f.conn.Close()
			})
			c, err := qmp.Connect(timeout(t), conn)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			err = c.Execute(timeout(t), "query-status", nil, nil)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Execute() = %v; want an error with %q", err, tt.want)
			}
			<-c.Done()
			if again := c.Execute(timeout(t), "query-status", nil, nil); again == nil {
				t.Error("Execute() on an ended connection = nil; want an error")
			}
			if err := c.Err(); err == nil {
				t.Error("Err() of an ended connection = nil")
			}
		})
	}
}

func TestHandshakeFails(t *testing.T) {
	tests := map[string]struct {
		serve func(f *fakeVMM)
		want  string
	}{
		"closed at once":     {func(f *fakeVMM) { f.conn.Close() }, "qmp greeting: QEMU closed the connection: EOF"},
		"another protocol":   {func(f *fakeVMM) { f.send("220 mail ready"); f.next() }, "qmp greeting: malformed message"},
		"no greeting":        {func(f *fakeVMM) { f.next() }, "qmp greeting: context deadline exceeded"},
		"greeting only":      {func(f *fakeVMM) { f.send(greeting); f.next(); f.next() }, "qmp qmp_capabilities: context deadline exceeded"},
		"capability refused": {func(f *fakeVMM) { f.send(greeting); f.fail(f.next(), "GenericError", "no"); f.next() }, "qmp qmp_capabilities: no"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			conn := listen(t, tt.serve)
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			c, err := qmp.Connect(ctx, conn)
			if err == nil || !strings.HasPrefix(err.Error(), tt.want) || c != nil {
				t.Errorf("Connect() = %v, %v; want nil, %q", c, err, tt.want)
			}
			// Connect owned the connection.
			if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
				t.Errorf("write after a failed Connect = %v; want net.ErrClosed", err)
			}
		})
	}
}

func TestClose(t *testing.T) {
	entered := make(chan struct{})
	c := connect(t, func(f *fakeVMM) map[string]func(*fakeRequest) {
		return map[string]func(*fakeRequest){"hang": func(*fakeRequest) { close(entered) }}
	})
	call := make(chan error, 1)
	go func() { call <- c.Execute(context.Background(), "hang", nil, nil) }()
	<-entered
	for range 2 {
		if err := c.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	}
	if err := <-call; !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Execute() in progress at Close = %v; want ErrClosed", err)
	}
	if err := c.Execute(timeout(t), "echo", nil, nil); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Execute() after Close = %v; want ErrClosed", err)
	}
	if err := c.Err(); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Err() after Close = %v; want ErrClosed", err)
	}
}

func TestFileDescriptors(t *testing.T) {
	var got []*os.File
	c := connect(t, func(f *fakeVMM) map[string]func(*fakeRequest) {
		take := func(r *fakeRequest, result string) {
			if file := f.takeFile(); file != nil {
				got = append(got, file)
				f.answer(r, result)
				return
			}
			f.fail(r, "GenericError", "No file descriptor supplied via SCM_RIGHTS")
		}
		return map[string]func(*fakeRequest){
			"add-fd": func(r *fakeRequest) { take(r, `{"fdset-id": 3, "fd": 17}`) },
			"getfd":  func(r *fakeRequest) { take(r, `{}`) },
		}
	})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fd, err := c.AddFD(timeout(t), w)
	if want := (qmp.FD{Set: 3, Number: 17}); err != nil || fd != want {
		t.Errorf("AddFD() = %+v, %v; want %+v, nil", fd, err, want)
	}
	if got, want := fd.Path(), "/dev/fdset/3"; got != want {
		t.Errorf("Path() = %q; want %q", got, want)
	}
	if err := c.GetFD(timeout(t), "tap0", w); err != nil {
		t.Errorf("GetFD() = %v", err)
	}
	if _, err := w.WriteString("still open, "); err != nil {
		t.Errorf("write to a passed file = %v", err)
	}
	w.Close()
	for _, f := range got {
		if _, err := f.WriteString("passed, "); err != nil {
			t.Error(err)
		}
		f.Close()
	}
	b, err := io.ReadAll(r)
	if want := "still open, passed, passed, "; err != nil || string(b) != want {
		t.Errorf("pipe holds %q, %v; want %q", b, err, want)
	}
	if _, err := c.AddFD(timeout(t), w); !errors.Is(err, os.ErrClosed) {
		t.Errorf("AddFD(closed file) = %v; want os.ErrClosed", err)
	}
}

func TestFileDescriptorNeedsUnixSocket(t *testing.T) {
	client, server := net.Pipe()
	go func() {
		_, _ = io.WriteString(server, greeting+"\n")
		b := make([]byte, 1024)
		_, _ = server.Read(b)
		_, _ = io.WriteString(server, `{"return": {}, "id": 1}`+"\n")
		_, _ = io.Copy(io.Discard, server)
	}()
	defer server.Close()
	c, err := qmp.Connect(timeout(t), client)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.AddFD(timeout(t), os.Stdin); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("AddFD() on a net.Pipe = %v; want errors.ErrUnsupported", err)
	}
}
