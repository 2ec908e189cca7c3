package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// loggerTiming bounds what a logging binary may take.
type loggerTiming struct {
	// read is for what its pipes hold when the streams have ended.
	read time.Duration
	// exit is for its end after the end of its input, before SIGTERM. A
	// binary that got no input has nothing to store and gets SIGTERM at once.
	exit time.Duration
	// term is for its end after stop, before SIGKILL. containerd's runc shim
	// allows as much.
	term time.Duration
	// reap is for the kernel to end a process after SIGKILL.
	reap time.Duration
}

var defaultLoggerTiming = loggerTiming{
	read: 10 * time.Second,
	exit: 2 * time.Second,
	term: 12 * time.Second,
	reap: 5 * time.Second,
}

// logger is a running logging binary. Its protocol is that of containerd's
// core/runtime/v2/logging: the environment holds CONTAINER_ID and
// CONTAINER_NAMESPACE and nothing else; descriptor 3 is stdout, 4 is stderr,
// and 5 is to be closed once the binary is ready, with a byte written before
// if the scheme is binary-v2.
//
// The binary outlives a crash of this process: it then reads the end of its
// input and can store what it has.
type logger struct {
	name   string // binary and process, for messages
	log    *log.Entry
	timing loggerTiming
	cmd    *exec.Cmd

	stdout, stderr *os.File    // write ends
	fed            atomic.Bool // there was input

	exited chan struct{} // closed when err is final
	err    error         // of the exit

	aborted   chan struct{}
	abortOnce sync.Once

	mu         sync.Mutex
	streams    int // that have not ended
	endOfInput time.Time
	terminated bool // by us
}

// startLogger starts a binary that gets the given number of streams and waits
// until it is ready or ctx ends.
func startLogger(ctx context.Context, u *url.URL, cfg Config, streams int, l *log.Entry, t loggerTiming) (_ *logger, err error) {
	name := fmt.Sprintf("logger %s of %s", u.Path, cfg.ID)
	if cfg.Namespace == "" {
		return nil, fmt.Errorf("start %s: no namespace: %w", name, errdefs.ErrFailedPrecondition)
	}
	var opened []*os.File
	defer func() {
		if err != nil {
			files(opened).abort()
		}
	}()
	var pipes [3]struct{ r, w *os.File }
	for i := range pipes {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
		pipes[i].r, pipes[i].w = r, w
		opened = append(opened, r, w)
	}
	stdout, stderr, ready := pipes[0], pipes[1], pipes[2]

	cmd := exec.Command(u.Path, loggerArgs(u)...)
	cmd.Env = []string{"CONTAINER_ID=" + cfg.ID, "CONTAINER_NAMESPACE=" + cfg.Namespace}
	cmd.ExtraFiles = []*os.File{stdout.r, stderr.r, ready.w}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, cause(err))
	}
	files{stdout.r, stderr.r, ready.w}.abort()
	lg := &logger{
		name: name, log: l, timing: t, cmd: cmd, streams: streams,
		stdout: stdout.w, stderr: stderr.w,
		exited: make(chan struct{}), aborted: make(chan struct{}),
	}
	go lg.watch()
	if err := lg.awaitReady(ctx, ready.r, u.Scheme == "binary-v2"); err != nil {
		lg.kill()
		return nil, err
	}
	ready.r.Close()
	return lg, nil
}

// loggerArgs turns a URI's query into arguments: each key, then its first
// value.
func loggerArgs(u *url.URL) []string {
	values := u.Query()
	var args []string
	for pair := range strings.SplitSeq(u.RawQuery, "&") {
		key, _, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(key)
		if v, ok := values[key]; ok && err == nil {
			args = append(args, key, v[0])
			delete(values, key)
		}
	}
	return args
}

// awaitReady reads the ready pipe. Its end without a byte is good enough for
// the first version of the protocol.
func (l *logger) awaitReady(ctx context.Context, ready *os.File, strict bool) error {
	stop := context.AfterFunc(ctx, func() { ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	n, err := ready.Read(make([]byte, 1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("start %s: not ready: %w", l.name, ctx.Err())
	case n == 0 && strict:
		err := errors.New("did not call ready (it may have crashed or exited prematurely)")
		l.abort()
		if l.exitsWithin(l.timing.reap) && l.err != nil {
			err = fmt.Errorf("%w: %w", err, l.err)
		}
		return fmt.Errorf("start %s: %w", l.name, err)
	case err != nil && !errors.Is(err, io.EOF):
		return fmt.Errorf("start %s: await ready: %w", l.name, err)
	}
	return nil
}

// watch waits for the binary's end and reports it.
func (l *logger) watch() {
	err := l.cmd.Wait()
	l.mu.Lock()
	asked := l.terminated
	early := l.endOfInput.IsZero()
	l.mu.Unlock()
	entry := l.log.WithField("status", l.cmd.ProcessState.String())
	switch {
	case asked && signalled(l.cmd.ProcessState):
		err = nil
		entry.Debugf("%s has ended as told", l.name)
	case err != nil || early:
		entry.Warnf("%s has ended", l.name)
	default:
		entry.Debugf("%s has ended", l.name)
	}
	l.err = err
	close(l.exited)
}

// signalled reports whether SIGTERM ended a process.
func signalled(state *os.ProcessState) bool {
	if state == nil {
		return false
	}
	ws, ok := state.Sys().(syscall.WaitStatus)
	return ok && ws.Signaled() && ws.Signal() == unix.SIGTERM
}

func (l *logger) exitsWithin(d time.Duration) bool {
	select {
	case <-l.exited:
		return true
	default:
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-l.exited:
		return true
	case <-timer.C:
		return false
	}
}

// loggerOutput is one stream to a logger.
type loggerOutput struct {
	l *logger
	w *os.File
}

func (o loggerOutput) Write(p []byte) (int, error) {
	o.l.fed.Store(true)
	return o.w.Write(p)
}

func (o loggerOutput) finish() { o.l.streamEnded() }
func (o loggerOutput) abort()  { o.l.abort() }

// streamEnded ends the input with the last stream, and not before: under runc
// both of its pipes end together.
//
// It waits until the binary has read everything, since a later SIGTERM makes
// some (nerdctl's) stop reading at once. The kernel has no event for a pipe
// that became empty, so this looks again and again, less and less often.
func (l *logger) streamEnded() {
	l.mu.Lock()
	l.streams--
	last := l.streams == 0
	l.mu.Unlock()
	if !last {
		return
	}
	defer l.closeInput()
	deadline := time.Now().Add(l.timing.read)
	for delay := time.Millisecond; pending(l.stdout) || pending(l.stderr); delay = min(2*delay, 250*time.Millisecond) {
		timer := time.NewTimer(min(delay, time.Until(deadline)))
		select {
		case <-timer.C:
			if time.Now().After(deadline) {
				return
			}
		case <-l.exited:
			timer.Stop()
			return
		case <-l.aborted:
			timer.Stop()
			return
		}
	}
}

// pending reports whether a pipe holds bytes that were not read: FIONREAD of
// pipe(7), which has the number of TIOCINQ.
func pending(w *os.File) bool {
	rc, err := w.SyscallConn()
	if err != nil {
		return false
	}
	var n int
	ctlErr := rc.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return ctlErr == nil && err == nil && n > 0
}

// abort ends the input at once.
func (l *logger) abort() {
	l.abortOnce.Do(func() { close(l.aborted) })
	l.closeInput()
}

func (l *logger) closeInput() {
	l.stdout.Close()
	l.stderr.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.endOfInput.IsZero() {
		l.endOfInput = time.Now()
	}
}

// stop waits for the binary to end by itself, then tells it to, then kills it.
func (l *logger) stop() error {
	killAt := time.Now().Add(l.timing.term)
	l.abort()
	l.mu.Lock()
	termAt := l.endOfInput
	l.mu.Unlock()
	if l.fed.Load() {
		termAt = termAt.Add(l.timing.exit)
	}
	if !l.exitsWithin(time.Until(termAt)) {
		l.mu.Lock()
		l.terminated = true
		l.mu.Unlock()
		l.cmd.Process.Signal(unix.SIGTERM)
	}
	if !l.exitsWithin(time.Until(killAt)) {
		l.kill()
		return fmt.Errorf("stop %s: killed: still running %v after its input ended", l.name, l.timing.term)
	}
	if l.err != nil {
		return fmt.Errorf("%s: %w", l.name, l.err)
	}
	return nil
}

// kill ends a binary that gets no more time.
func (l *logger) kill() {
	l.abort()
	l.cmd.Process.Kill()
	if !l.exitsWithin(l.timing.reap) {
		l.log.Errorf("%s does not end after SIGKILL", l.name)
	}
}
