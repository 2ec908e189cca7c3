package guestspec

import (
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// RewriteProcess does for an exec's process what Rewrite does for a spec's.
// The strings are warnings.
func RewriteProcess(p *specs.Process) (*specs.Process, []string, error) {
	if err := checkProcess(p); err != nil {
		return nil, nil, err
	}
	src, err := clone(p)
	if err != nil {
		return nil, nil, err
	}
	var rep report
	out := rewriteProcess(src, &rep)
	return out, rep.warnings, nil
}

// checkProcess words errors as runc's validateProcessSpec does.
func checkProcess(p *specs.Process) error {
	switch {
	case p == nil:
		return invalid("process property must not be empty")
	case p.Cwd == "":
		return invalid("Cwd property must not be empty")
	case !filepath.IsAbs(p.Cwd):
		return invalid("Cwd must be an absolute path")
	case len(p.Args) == 0:
		return invalid("args must not be empty")
	}
	return nil
}

// rewriteProcess names every field that is kept.
func rewriteProcess(p *specs.Process, rep *report) *specs.Process {
	if p.ApparmorProfile != "" && p.ApparmorProfile != "unconfined" {
		rep.warn("apparmorProfile %s is not applied: the virtual machine has no AppArmor", p.ApparmorProfile)
	}
	if p.SelinuxLabel != "" {
		rep.warn("selinuxLabel %s is not applied: the virtual machine has no SELinux", p.SelinuxLabel)
	}
	if a := p.ExecCPUAffinity; a != nil && (a.Initial != "" || a.Final != "") {
		rep.warn("execCPUAffinity is not applied: it names CPUs of the host")
	}
	return &specs.Process{
		Terminal:        p.Terminal,
		ConsoleSize:     p.ConsoleSize,
		User:            p.User,
		Args:            p.Args,
		Env:             p.Env,
		Cwd:             p.Cwd,
		Capabilities:    p.Capabilities,
		Rlimits:         p.Rlimits,
		NoNewPrivileges: p.NoNewPrivileges,
		OOMScoreAdj:     p.OOMScoreAdj,
		Scheduler:       p.Scheduler,
		IOPriority:      p.IOPriority,
	}
}
