package main

import (
	"bufio"
	"fmt"
	"io"
	"time"
)

// dead is for how long no CPU of the machine is silent that is only slow.
const dead = 90 * time.Second

// watch reads the numbers of the machine's CPUs, one a line, which each CPU
// writes once a second for as long as it takes interrupts. An emulated CPU with
// SVM now and then stops doing so: it sleeps with the global interrupt flag
// clear, which the kernel there has long set again, and what waits for that CPU
// waits for ever. watch returns nil at the end of r, and an error when a CPU
// that has written is silent for longer than patience.
func watch(r io.Reader, patience time.Duration) error {
	lines := make(chan string)
	done := make(chan struct{})
	defer close(done)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(r); s.Scan(); {
			select {
			case lines <- s.Text():
			case <-done:
				return
			}
		}
	}()
	tick := time.NewTicker(patience / 10)
	defer tick.Stop()
	last := make(map[string]time.Time)
	for {
		select {
		case cpu, ok := <-lines:
			if !ok {
				return nil
			}
			last[cpu] = time.Now()
		case <-tick.C:
			for cpu, t := range last {
				if time.Since(t) > patience {
					return fmt.Errorf("CPU %s of the nested machine has been silent for %v: it takes no interrupts", cpu, patience)
				}
			}
		}
	}
}
