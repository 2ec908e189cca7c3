package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// BenchmarkPod prints medians of what kubelet waits for, in ms: a pod until it
// is ready, a first and a second container in it, an exec as a probe makes it,
// the removal. Then what a pod gets of the network: the throughput of TCP to
// another pod on the same bridge, in MB/s, and the round trips of 64 bytes, in
// us. runc and both sandbox modes take turns.
func BenchmarkPod(b *testing.B) {
	probe, err := image.Probe(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	var subjects []*subject
	for _, mode := range env.Modes {
		e := startCRI(b, env.CRI{Sandboxer: mode, Images: []image.Image{probe}})
		subjects = append(subjects, &subject{b: b, name: mode, runtime: "vmrt", e: e, samples: map[string][]float64{}})
	}
	subjects = append(subjects, &subject{b: b, name: "runc", runtime: "runc", e: subjects[0].e, samples: map[string][]float64{}})
	for _, s := range subjects {
		// Images are pulled, and programs in the page cache.
		s.measure()
		clear(s.samples)
	}
	for b.Loop() {
		for _, s := range subjects {
			s.measure()
		}
	}
	b.ReportMetric(0, "ns/op")
	for _, s := range subjects {
		for what, all := range s.samples {
			slices.Sort(all)
			b.ReportMetric(all[len(all)/2], s.name+"-"+what)
		}
	}
}

// subject is what the benchmark compares.
type subject struct {
	b             *testing.B
	name, runtime string
	e             *env.Env
	samples       map[string][]float64 // by what they are and their unit
}

func (s *subject) sample(what string, x float64) { s.samples[what] = append(s.samples[what], x) }

func (s *subject) lap(what string, f func() error) {
	begin := time.Now()
	if err := f(); err != nil {
		s.b.Fatal(err)
	}
	s.sample(what+"-ms", float64(time.Since(begin).Microseconds())/1000)
}

// measure takes a sample of everything.
func (s *subject) measure() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	var pods [2]*env.Pod
	for i := range pods {
		s.lap("pod", func() (err error) {
			pods[i], err = s.e.RunPodOn(ctx, s.runtime, fmt.Sprint("bench", i), nil)
			return err
		})
	}
	run := func(what string, pod int, command ...string) (id string) {
		s.lap(what, func() (err error) {
			id, err = pods[pod].Run(ctx, what, image.ProbeName, env.Object{"command": command})
			return err
		})
		return id
	}
	run("first", 0, "probe", "serve", fmt.Sprintf(":%d", probePort))
	client := run("first", 1, "sleep", "1000")
	run("second", 1, "sleep", "1000")
	for range 3 {
		s.lap("exec", func() error {
			_, err := s.e.Crictl(ctx, "exec", "-s", client, "true").Run()
			return err
		})
	}
	s.network(ctx, client, at(s.address(ctx, pods[0]), probePort))
	for _, p := range pods {
		s.lap("remove", func() error { return p.Remove(ctx) })
	}
}

// network measures from a container to a probe that serves in another pod.
func (s *subject) network(ctx context.Context, id, address string) {
	const size = 64 << 20
	probe := func(args ...string) float64 {
		out, err := s.e.Crictl(ctx, append([]string{"exec", "-s", id, "probe"}, args...)...).Run()
		ns, convErr := strconv.ParseFloat(strings.TrimSpace(out), 64)
		if err != nil || convErr != nil {
			s.b.Fatalf("probe %q = %q, %v", args, out, err)
		}
		return ns
	}
	s.sample("tcp-MB/s", size*1e3/probe("fill", address, fmt.Sprint(size)))
	for _, network := range []string{"tcp", "udp"} {
		s.sample(network+"-rtt-us", probe("roundtrip", network, address, "64", "300")/1e3)
	}
}

// address returns a pod's IP address.
func (s *subject) address(ctx context.Context, p *env.Pod) string {
	out, err := s.e.Crictl(ctx, "inspectp", p.ID).Run()
	var pod struct {
		Status struct{ Network struct{ IP string } }
	}
	if err == nil {
		err = json.Unmarshal([]byte(out), &pod)
	}
	if err != nil {
		s.b.Fatal(err)
	}
	return pod.Status.Network.IP
}
