package main

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestWatch(t *testing.T) {
	for _, tt := range []struct {
		name   string
		silent int // this CPU writes for a minute only; -1 for none
		want   string
	}{
		{"alive", -1, ""},
		{"first", 0, "CPU 0 "},
		{"second", 1, "CPU 1 "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, w := io.Pipe()
				begin := time.Now()
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					defer w.Close()
					for time.Since(begin) < 10*time.Minute {
						for cpu := range 2 {
							if cpu == tt.silent && time.Since(begin) > time.Minute {
								continue
							}
							if _, err := fmt.Fprintln(w, cpu); err != nil {
								return
							}
						}
						time.Sleep(time.Second)
					}
				}()
				err := watch(r, dead)
				r.Close()
				<-ended
				if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
					t.Errorf("watch() = %v; want %q", err, tt.want)
				}
				if took := time.Since(begin); tt.want != "" && (took < time.Minute+dead || took > 2*time.Minute+dead) {
					t.Errorf("a CPU that is silent after a minute is noticed after %v", took)
				}
			})
		})
	}
}
