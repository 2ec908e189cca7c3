package env

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Terminal is the user's end of a pseudo terminal on which a command runs. It
// keeps everything that the command printed. Its methods may be called from
// several goroutines.
type Terminal struct {
	master *os.File

	mu     sync.Mutex
	out    bytes.Buffer
	closed bool          // no more output comes
	more   chan struct{} // closed, and replaced, when out or closed changed
}

// StartTerminal starts the command as the leader of a session with a terminal
// of that size. The caller waits for the command with c.Wait and ends with
// Close.
func (c *Cmd) StartTerminal(rows, cols uint16) (_ *Terminal, err error) {
	master, slave, err := openPTY()
	if err != nil {
		return nil, err
	}
	defer slave.Close()
	t := &Terminal{master: master, more: make(chan struct{})}
	if err := errors.Join(t.Resize(rows, cols), t.start(c, slave)); err != nil {
		master.Close()
		return nil, err
	}
	go t.copy()
	return t, nil
}

func (t *Terminal) start(c *Cmd, slave *os.File) error {
	c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	c.Env = append(c.Env, "TERM=xterm")
	return c.Start()
}

// Resize changes the terminal's size; the command gets SIGWINCH.
func (t *Terminal) Resize(rows, cols uint16) error {
	err := control(t.master, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// Type sends keystrokes.
func (t *Terminal) Type(s string) error {
	_, err := io.WriteString(t.master, s)
	return err
}

// Output returns everything printed so far.
func (t *Terminal) Output() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.out.String()
}

// Expect waits until the output, from the given offset on, contains s, and
// returns the offset behind it. It gives up after the timeout, or when no more
// output can come.
func (t *Terminal) Expect(from int, s string, timeout time.Duration) (int, error) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	for {
		t.mu.Lock()
		out, closed, more := t.out.String(), t.closed, t.more
		t.mu.Unlock()
		if i := strings.Index(out[from:], s); i >= 0 {
			return from + i + len(s), nil
		}
		if closed {
			return 0, fmt.Errorf("terminal closed before %q; output: %q", s, out[from:])
		}
		select {
		case <-more:
		case <-timer.C:
			return 0, fmt.Errorf("no %q on the terminal within %v; output: %q", s, timeout, out[from:])
		}
	}
}

// Close hangs up.
func (t *Terminal) Close() error { return t.master.Close() }

func (t *Terminal) copy() {
	buf := make([]byte, 4096)
	for {
		n, err := t.master.Read(buf)
		t.mu.Lock()
		t.out.Write(buf[:n])
		t.closed = err != nil // EIO: the last user of the slave is gone
		close(t.more)
		t.more = make(chan struct{})
		t.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// openPTY opens a new pseudo terminal: pty(7), ioctl_tty(2).
func openPTY() (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open pseudo terminal: %w", err)
	}
	var n int
	err = control(master, func(fd int) (err error) {
		if n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN); err != nil {
			return err
		}
		return unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	})
	if err == nil {
		slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, fmt.Errorf("open pseudo terminal: %w", err)
	}
	return master, slave, nil
}

// control calls f with a file's descriptor, and unlike File.Fd leaves the file
// in non-blocking mode, so that Close ends a Read.
func control(file *os.File, f func(fd int) error) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = conn.Control(func(fd uintptr) { ferr = f(int(fd)) })
	return errors.Join(err, ferr)
}
