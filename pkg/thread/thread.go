//go:build linux

// Package thread runs functions on operating system threads of their own,
// which may change what a thread has for itself, such as its namespaces.
// Both sides of a virtual machine use it.
//
// Contract. The thread ends with the function, and nothing else runs on it
// before or after. It is never the process's first thread: that one cannot end
// before the process, and /proc/self and /proc/<pid> show its namespaces as
// those of the process.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Go runs f on a new thread and returns at once.
func Go(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return // still locked: the runtime ends the thread
		}
		// Keep the first thread busy until f has found another one.
		found := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(found)
			f()
		}()
		<-found
		runtime.UnlockOSThread()
	}()
}

// Run runs f on a new thread and returns its error.
func Run(f func() error) error {
	done := make(chan error)
	Go(func() { done <- f() })
	return <-done
}
