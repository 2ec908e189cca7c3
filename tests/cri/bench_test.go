package cri

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// BenchmarkPod prints the medians in ms of what kubelet waits for: a pod until
// it is ready, a further container in it, and an exec as a probe makes it. runc
// and both sandbox modes take turns.
func BenchmarkPod(b *testing.B) {
	type subject struct {
		name, runtime string
		e             *env.Env
		samples       map[string][]time.Duration
	}
	var subjects []*subject
	for _, mode := range env.Modes {
		e := startCRI(b, env.CRI{Sandboxer: mode})
		subjects = append(subjects, &subject{name: mode, runtime: "vmrt", e: e, samples: map[string][]time.Duration{}})
	}
	subjects = append(subjects, &subject{name: "runc", runtime: "runc", e: subjects[0].e, samples: map[string][]time.Duration{}})
	for b.Loop() {
		for _, s := range subjects {
			benchmarkPod(b, s.e, s.runtime, func(what string, d time.Duration) {
				s.samples[what] = append(s.samples[what], d)
			})
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, s := range subjects {
		for what, all := range s.samples {
			slices.Sort(all)
			b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, s.name+"-"+what+"-ms")
		}
	}
}

func benchmarkPod(b *testing.B, e *env.Env, runtime string, sample func(string, time.Duration)) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	lap := func(what string, f func() error) {
		begin := time.Now()
		if err := f(); err != nil {
			b.Fatal(err)
		}
		sample(what, time.Since(begin))
	}
	var p *env.Pod
	lap("pod", func() (err error) {
		p, err = e.RunPodOn(ctx, runtime, "bench", nil)
		return err
	})
	var id string
	for _, name := range []string{"first", "second"} {
		lap(name, func() (err error) {
			id, err = p.Run(ctx, name, image.BusyboxName, env.Object{"command": []string{"sleep", "1000"}})
			return err
		})
	}
	lap("exec", func() error {
		_, err := e.Crictl(ctx, "exec", "-s", id, "true").Run()
		return err
	})
	lap("remove", func() error { return p.Remove(ctx) })
}
