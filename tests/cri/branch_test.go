package cri

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/vmrt/vmrt/tests/env"
)

// TestLongTermBranch is a pod's life under the containerd that distributions
// keep for long; the other tests have the current one.
func TestLongTermBranch(t *testing.T) {
	for _, mode := range env.Modes {
		t.Run(mode, func(t *testing.T) {
			testLongTermBranch(t, startConfig(t, env.Config{Containerd: "2.3", CRI: &env.CRI{Sandboxer: mode}}))
		})
	}
}

func testLongTermBranch(t *testing.T, e *env.Env) {
	ctx := env.Context(t)
	if out, err := e.Crictl(ctx, "version").Run(); err != nil || !strings.Contains(out, "v2.3.") {
		t.Fatalf("crictl version = %q, %v; want containerd 2.3", out, err)
	}
	p := runPod(t, e, "pod", env.Object{"hostname": "named"})
	web := p.run("web", "mkdir /srv; echo page > /srv/index.html; exec httpd -f -p 127.0.0.1:8080 -h /srv")
	log := p.run("log", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done")
	p.awaitListener(web, 8080) // with exec
	if got := p.sh(log, "cat /srv/index.html 2>/dev/null; hostname"); got != "named" {
		t.Errorf("the other container says %q; want its own files, and the pod's name", got)
	}
	_, err := e.Crictl(ctx, "exec", "-s", web, "sh", "-c", "exit 9").Run()
	if env.ExitCode(err) <= 0 || !strings.Contains(err.Error(), "9") {
		t.Errorf("exec of exit 9 = %v; want an error that names 9", err)
	}
	forward := func() {
		t.Helper()
		cmd := e.Crictl(ctx, "port-forward", p.ID, "18080:8080")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			cmd.Cancel()
			cmd.Wait()
		}()
		if got := fetch(t, e, "http://127.0.0.1:18080/"); got != "page" {
			t.Errorf("port-forward = %q; want page", got)
		}
	}
	forward()

	// A container ends while containerd is away.
	ends, end := p.runUntil("ends", 5)
	restartAfter(t, e, end)
	if c := p.awaitExit(ends); c.Status.ExitCode != 5 {
		t.Errorf("exit code = %d; want 5", c.Status.ExitCode)
	}
	if got, _ := p.state(); got != "SANDBOX_READY" {
		t.Errorf("pod is %s; want it ready", got)
	}
	forward()
	if got := p.sh(p.run("again", "sleep 1000"), "echo new"); got != "new" {
		t.Errorf("a new container says %q; want new", got)
	}
	p.awaitLog("log", "line 20\n") // it goes on
	p.crictl("stop", "-t", "0", log)
	checkLines(t, filepath.Join(p.LogDir, "log.log"), 0)
	p.crictl("rm", log)
}
