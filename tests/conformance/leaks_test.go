package conformance

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// holdings are what a shim and its agent hold on to.
type holdings struct {
	// files and threads of the shim; goroutines of it.
	files, goroutines int
	// files and children of the agent.
	agentFiles, agentChildren int
}

// holdings looks at the shim, and by a container that sees the guest's
// processes at the agent.
func (s *shim) holdings(observer *shim, id string) (h holdings) {
	s.t.Helper()
	pid := s.pid()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		s.t.Fatal(err)
	}
	h.files = len(fds)
	h.goroutines = s.goroutines(pid)
	out, errs, status := observer.exec(id, "sh", "-c", "ls /proc/1/fd | wc -l; cat /proc/1/task/*/children | wc -w")
	if _, err := fmt.Sscan(out, &h.agentFiles, &h.agentChildren); err != nil || status != 0 {
		s.t.Fatalf("look at the agent: %q, stderr %q, status %d: %v", out, errs, status, err)
	}
	return h
}

// goroutines counts those of a shim, which writes them to its log when it gets
// SIGUSR1.
func (s *shim) goroutines(pid int) int {
	s.t.Helper()
	const end = "END goroutine stack dump"
	before := strings.Count(s.log.String(), end)
	send(s.t.(*testing.T), pid, syscall.SIGUSR1)
	for deadline := time.Now().Add(callTimeout); ; time.Sleep(5 * time.Millisecond) {
		log := s.log.String()
		if strings.Count(log, end) > before {
			return strings.Count(log[strings.LastIndex(log, "BEGIN goroutine stack dump"):], `\ngoroutine `)
		}
		if time.Now().After(deadline) {
			s.t.Fatal("the shim does not write down its goroutines")
		}
	}
}

// TestNoLeaks: what has come and gone in a pod leaves nothing in its shim or its
// agent.
func TestNoLeaks(t *testing.T) {
	s := newShim(t, options{})
	observer := s.running(t, options{spec: func(spec *specs.Spec) {
		sleeper(spec)
		privileged(spec)
		spec.Linux.Namespaces = without(spec.Linux.Namespaces, specs.PIDNamespace)
	}})
	live := func(round string) {
		var wg sync.WaitGroup
		for worker := range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for i := range 6 {
					// What it leaves behind becomes the agent's to wait for.
					id := fmt.Sprintf("%s-%d-%d", round, worker, i)
					st := newStreams(t, true, false)
					if err := observer.addExec(id, st, false, "sh", "-c", "read x; echo $x; (sleep 0.1 >/dev/null 2>&1 &); no-such-program"); err != nil {
						t.Errorf("Exec(%s) = %v", id, err)
						return
					}
					if a := ask(observer, start(id)); !a.ok {
						t.Errorf("Start(%s) = %v", id, a)
						return
					}
					fmt.Fprintln(st.in, id)
					if a := ask(observer, wait(id)); !a.ok {
						t.Errorf("Wait(%s) = %v", id, a)
					}
					if a := ask(observer, remove(id)); !a.ok {
						t.Errorf("Delete(%s) = %v", id, a)
					}
				}
			}()
		}
		wg.Wait()
		for i := range 2 {
			c := s.add(t, args("sh", "-c", "sleep 1000 & echo $0", "word"))
			if out, _, status := c.run(); out != "word\n" || status != 0 {
				t.Errorf("container %d of round %s = %q, %d; want word, 0", i, round, out, status)
			}
			c.delete("")
		}
		// What cannot be created is not kept either.
		c := s.add(t, args("no-such-program"))
		if _, err := c.create(newStreams(t, true, false), false); err == nil {
			t.Error("Create of a missing program = nil; want an error")
		}
	}
	live("warm")
	before := s.holdings(observer, "before")
	live("again")
	// What ends after an answer takes a moment.
	var after holdings
	for i := range 20 {
		after = s.holdings(observer, fmt.Sprintf("after%d", i))
		if after.files <= before.files && after.goroutines <= before.goroutines &&
			after.agentFiles <= before.agentFiles && after.agentChildren <= before.agentChildren {
			t.Logf("held before %+v, after %+v", before, after)
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
	t.Errorf("24 execs and 3 containers more, and shim and agent hold %+v; before %+v", after, before)
}
