package cri

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
	"github.com/vmrt/vmrt/tests/env/image"
)

// With io_type = "streaming" everything is as it is with FIFOs.
func TestStreamingIO(t *testing.T) {
	e := startCRI(t, env.CRI{Sandboxer: "shim", Streaming: true})
	p := runPod(t, e, "pod", nil)
	stays := p.run("stays", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done")
	for _, tc := range []struct {
		name string
		test func(t *testing.T, p *pod, id string)
	}{
		{"log of a container that ends", streamedLog},
		{"exec", streamedExec},
		{"stdin of an exec", streamedStdin},
		{"attach", streamedAttach},
		{"restart", streamedRestart},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.test(t, &pod{Pod: p.Pod, t: t, e: e, ctx: env.Context(t)}, stays)
		})
	}
}

// CRI ends a container's streams when it hears of its exit.
func streamedLog(t *testing.T, p *pod, _ string) {
	const lines = 200_000
	id := p.run("ends", fmt.Sprintf("seq 1 %d; echo problem >&2; exit 3", lines))
	if c := p.awaitExit(id); c.Status.ExitCode != 3 {
		t.Errorf("exit code = %d; want 3", c.Status.ExitCode)
	}
	b, err := os.ReadFile(filepath.Join(p.LogDir, "ends.log"))
	if err != nil {
		t.Fatal(err)
	}
	next := 1
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, " stderr F problem") {
			continue
		}
		if _, text, _ := strings.Cut(strings.TrimSpace(line), " stdout F "); text != fmt.Sprint(next) {
			t.Fatalf("log has %q; want line %d", line, next)
		}
		next++
	}
	if next != lines+1 {
		t.Errorf("log has %d lines; want %d", next-1, lines)
	}
	if !bytes.Contains(b, []byte(" stderr F problem\n")) {
		t.Error("log lacks what was written to stderr")
	}
}

func streamedExec(t *testing.T, p *pod, id string) {
	if got := p.sh(id, "seq 1 10000 | tail -n 1"); got != "10000" {
		t.Errorf("exec = %q; want 10000", got)
	}
	if got := p.crictl("exec", id, "sh", "-c", "echo out; echo err >&2"); got != "out" {
		t.Errorf("exec = %q; want out", got)
	}
	if _, err := p.e.Crictl(p.ctx, "exec", "-s", id, "sh", "-c", "exit 4").Run(); err == nil || !strings.Contains(err.Error(), "exited with 4") {
		t.Errorf("exec of exit 4 = %v; want its exit code", err)
	}
}

func streamedStdin(t *testing.T, p *pod, id string) {
	sent := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{1}).Read(sent)
	exec := p.e.Crictl(p.ctx, "exec", "-i", id, "cat")
	exec.Stdin = bytes.NewReader(sent)
	got, err := exec.Run()
	if err != nil || got != string(sent) {
		t.Errorf("cat of %d bytes = %d bytes, %v; want the same", len(sent), len(got), err)
	}
	// A process that does not read its input holds nothing up.
	exec = p.e.Crictl(p.ctx, "exec", "-i", id, "true")
	exec.Stdin = bytes.NewReader(sent)
	if _, err := exec.Run(); err != nil {
		t.Errorf("exec that does not read = %v; want nil", err)
	}
}

func streamedAttach(t *testing.T, p *pod, _ string) {
	id, err := p.Pod.Run(p.ctx, "cat", image.BusyboxName, env.Object{
		"command": []string{"sh", "-c", "read x; echo got $x; cat"}, "stdin": true, "stdin_once": true,
	})
	if err != nil {
		t.Fatal(err)
	}
	attach := p.e.Crictl(p.ctx, "attach", "-i", id)
	r, w := io.Pipe()
	attach.Stdin = r
	go func() {
		io.WriteString(w, "a line\nand the rest")
		w.Close()
	}()
	out, err := attach.Run()
	if err != nil || out != "got a line\nand the rest" {
		t.Errorf("attach = %q, %v; want the input", out, err)
	}
	if c := p.awaitExit(id); c.Status.ExitCode != 0 {
		t.Errorf("exit code = %d; want 0", c.Status.ExitCode)
	}
}

// A containerd that was restarted takes up its streams, and nothing is missing
// but what it had not logged when it ended.
func streamedRestart(t *testing.T, p *pod, id string) {
	waits, err := p.Pod.Run(p.ctx, "waits", image.BusyboxName, env.Object{
		"command": []string{"cat"}, "stdin": true, "stdin_once": true,
	})
	if err != nil {
		t.Fatal(err)
	}
	created, err := p.Create(p.ctx, "created", image.BusyboxName, env.Object{"command": []string{"echo", "started"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.e.RestartContainerd(p.ctx); err != nil {
		t.Fatal(err)
	}
	if got := p.inspect(id).Status.State; got != "CONTAINER_RUNNING" {
		t.Errorf("container is %s; want it running", got)
	}
	if got := p.sh(id, "sleep 2; echo alive"); got != "alive" {
		t.Errorf("exec = %q; want alive", got)
	}
	checkLines(t, filepath.Join(p.LogDir, "stays.log"), 1)

	attach := p.e.Crictl(p.ctx, "attach", "-i", waits)
	attach.Stdin = strings.NewReader("after the restart")
	if out, err := attach.Run(); err != nil || out != "after the restart" {
		t.Errorf("attach = %q, %v; want the input", out, err)
	}
	p.crictl("start", created)
	p.awaitExit(created)
	if b, err := os.ReadFile(filepath.Join(p.LogDir, "created.log")); err != nil || !bytes.Contains(b, []byte("stdout F started")) {
		t.Errorf("log of a container that was created before the restart = %q, %v", b, err)
	}
}
