//go:build linux

package thread_test

import (
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vmrt/vmrt/pkg/thread"
)

// The first thread is free to be chosen: nothing is locked to it.
func TestNeverTheFirst(t *testing.T) {
	for range 1000 {
		var running sync.WaitGroup
		for range 4 * runtime.GOMAXPROCS(0) {
			running.Add(2)
			go func() { // what the runtime puts on any thread
				defer running.Done()
				runtime.Gosched()
			}()
			thread.Go(func() {
				defer running.Done()
				if unix.Gettid() == os.Getpid() {
					t.Error("Go runs on the process's first thread")
				}
			})
		}
		running.Wait()
	}
}

func TestRun(t *testing.T) {
	want := errors.New("failed")
	before, err := os.Readlink("/proc/self/ns/uts")
	if err != nil {
		t.Fatal(err)
	}
	err = thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil { // needs no privilege
			return err
		}
		return want
	})
	if err != want {
		t.Errorf("Run() = %v; want what the function returned", err)
	}
	if after, err := os.Readlink("/proc/self/ns/uts"); err != nil || after != before {
		t.Errorf("the process's namespace = %s, %v; want %s", after, err, before)
	}
}
