package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// property is something that an OCI spec asks for, with a command in the
// container that finds out whether it got it.
type property struct {
	name   string
	spec   func(*specs.Spec)
	rootfs func(dir string)
	// command is for the shell; stdout and status are what runc gives, too.
	command string
	stdout  string
	status  uint32
	// vmOnly says why runc on this machine is not asked: the answer is about
	// the guest's kernel, or needs what the machine lacks.
	vmOnly string
}

// run starts a container of its own for the property, in the machine of s.
func (p property) run(t *testing.T, s *shim) (stdout, stderr string, status uint32) {
	t.Helper()
	c := s.add(t, options{rootfs: p.rootfs, spec: func(spec *specs.Spec) {
		spec.Process.Args = []string{"sh", "-c", p.command}
		if p.spec != nil {
			p.spec(spec)
		}
	}})
	return c.run()
}

// checkProperties runs each property's container under vmrt, all in one
// virtual machine, and under runc, to know that the expectation is right.
func checkProperties(t *testing.T, properties []property) {
	control := newShim(t, options{runtime: runcRuntime(t)})
	s := newShim(t, options{})
	// Keeps the virtual machine while containers come and go.
	keeper := s.add(t, options{spec: sleeper})
	keeper.mustCreate(nil, false)
	for _, p := range properties {
		t.Run(p.name, func(t *testing.T) {
			if p.vmOnly == "" {
				if out, errs, status := p.run(t, control); out != p.stdout || status != p.status {
					t.Errorf("under runc, %s = %q, stderr %q, status %d; want %q, %d", p.command, out, errs, status, p.stdout, p.status)
				}
			}
			if out, errs, status := p.run(t, s); out != p.stdout || status != p.status {
				t.Errorf("%s = %q, stderr %q, status %d; want %q, %d", p.command, out, errs, status, p.stdout, p.status)
			}
		})
	}
}

// lines joins lines of output.
func lines(l ...string) string { return strings.Join(l, "\n") + "\n" }

// setuidRoot makes su in the root file system become root without a password.
func setuidRoot(dir string) {
	os.WriteFile(filepath.Join(dir, "etc/passwd"), []byte("root::0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"), 0o644)
	os.Remove(filepath.Join(dir, "bin/su"))
	b, _ := os.ReadFile(filepath.Join(dir, "bin/busybox"))
	os.WriteFile(filepath.Join(dir, "bin/su"), b, 0o755)
	os.Chmod(filepath.Join(dir, "bin/su"), 0o755|os.ModeSetuid)
}

// files is an option that puts files into the root file system.
func files(content map[string]string) func(dir string) {
	return func(dir string) {
		for name, text := range content {
			path := filepath.Join(dir, name)
			os.MkdirAll(filepath.Dir(path), 0o755)
			os.WriteFile(path, []byte(text), 0o644)
		}
	}
}

func deny(action specs.LinuxSeccompAction, errno *uint, names ...string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Architectures: []specs.Arch{specs.ArchX86_64},
			Syscalls:      []specs.LinuxSyscall{{Names: names, Action: action, ErrnoRet: errno}},
		}
	}
}

func rlimit(name string, soft, hard uint64) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Process.Rlimits = append(s.Process.Rlimits, specs.POSIXRlimit{Type: name, Soft: soft, Hard: hard})
	}
}

func ptr[T any](v T) *T { return &v }

// TestSecurityProperties is about what a container may not do.
func TestSecurityProperties(t *testing.T) {
	checkProperties(t, []property{
		{
			name:    "readonly rootfs",
			spec:    func(s *specs.Spec) { s.Root.Readonly = true },
			command: "touch /x 2>&1 | grep -o Read-only.*; mkdir /bin/x 2>/dev/null || echo no; touch /run/x && echo yes",
			stdout:  lines("Read-only file system", "no", "yes"),
		},
		{
			name: "masked paths",
			spec: func(s *specs.Spec) {
				s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, "/secret", "/folder", "/no/such/path")
			},
			rootfs:  files(map[string]string{"secret": "secret", "folder/secret": "secret"}),
			command: "for f in /proc/keys /proc/timer_list /secret; do wc -c < $f; done; ls /sys/firmware /folder | wc -l; touch /folder/x 2>/dev/null || echo no",
			// ls names each of two folders and puts a line between.
			stdout: lines("0", "0", "0", "3", "no"),
		},
		{
			name: "readonly paths",
			spec: func(s *specs.Spec) {
				s.Linux.ReadonlyPaths = append(s.Linux.ReadonlyPaths, "/folder", "/etc/group", "/no/such/path")
			},
			rootfs:  files(map[string]string{"folder/file": "text\n"}),
			command: "cat /folder/file; for f in /proc/sys/kernel/hostname /proc/sysrq-trigger /proc/irq/x /folder/file /folder/new /etc/group; do (echo x > $f) 2>/dev/null || echo no; done",
			stdout:  lines("text", "no", "no", "no", "no", "no", "no"),
		},
		{
			name: "capability sets",
			spec: func(s *specs.Spec) {
				s.Process.User = specs.User{UID: 1000, GID: 1000}
				bind := []string{"CAP_NET_BIND_SERVICE"}
				s.Process.Capabilities = &specs.LinuxCapabilities{
					Bounding: append([]string{"CAP_CHOWN"}, bind...), Effective: bind, Permitted: bind, Inheritable: bind, Ambient: bind,
				}
			},
			command: "grep Cap /proc/self/status",
			stdout: lines("CapInh:\t0000000000000400", "CapPrm:\t0000000000000400", "CapEff:\t0000000000000400",
				"CapBnd:\t0000000000000401", "CapAmb:\t0000000000000400"),
		},
		{
			name: "no capabilities",
			spec: func(s *specs.Spec) { s.Process.Capabilities = &specs.LinuxCapabilities{} },
			command: "grep -E 'Cap(Eff|Bnd)' /proc/self/status; touch /x; chown 1 /x 2>/dev/null || echo no; " +
				"mknod /n c 1 3 2>/dev/null || echo no; mount -t tmpfs t /tmp 2>/dev/null || echo no",
			stdout: lines("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "no", "no", "no"),
		},
		{
			name: "dropped capability",
			spec: func(s *specs.Spec) {
				c := []string{"CAP_CHOWN"}
				s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: c, Effective: c, Permitted: c}
			},
			command: "touch /x; chown 1000 /x && echo yes; chmod 600 /x 2>/dev/null || echo no",
			stdout:  lines("yes", "no"),
		},
		{
			name: "setuid binary with no_new_privs",
			spec: func(s *specs.Spec) {
				s.Process.User = specs.User{UID: 1000, GID: 1000}
				s.Process.NoNewPrivileges = true
			},
			rootfs:  setuidRoot,
			command: "grep NoNewPrivs /proc/self/status; /bin/su -c 'id -u' 2>/dev/null || echo no",
			stdout:  lines("NoNewPrivs:\t1", "no"),
		},
		{
			name: "setuid binary",
			spec: func(s *specs.Spec) {
				s.Process.User = specs.User{UID: 1000, GID: 1000}
				s.Process.NoNewPrivileges = false
			},
			rootfs:  setuidRoot,
			command: "grep NoNewPrivs /proc/self/status; /bin/su -c 'id -u'",
			stdout:  lines("NoNewPrivs:\t0", "0"),
		},
		{
			name:    "seccomp error",
			spec:    deny(specs.ActErrno, nil, "mkdir", "mkdirat"),
			command: "grep Seccomp: /proc/self/status; mkdir /x 2>&1 | grep -o Operation.*",
			stdout:  lines("Seccomp:\t2", "Operation not permitted"),
		},
		{
			name:    "seccomp chosen error",
			spec:    deny(specs.ActErrno, ptr(uint(28)), "mkdir", "mkdirat"),
			command: "mkdir /x 2>&1 | grep -o No.*",
			stdout:  lines("No space left on device"),
		},
		{
			name:    "seccomp kill",
			spec:    deny(specs.ActKillProcess, nil, "mkdir", "mkdirat"),
			command: "echo before; exec mkdir /x",
			stdout:  lines("before"),
			status:  128 + 31, // SIGSYS
		},
		{
			name: "seccomp argument",
			spec: func(s *specs.Spec) {
				s.Linux.Seccomp = &specs.LinuxSeccomp{
					DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86, specs.ArchX32},
					Syscalls: []specs.LinuxSyscall{{
						// Only for AF_INET.
						Names: []string{"socket"}, Action: specs.ActErrno, ErrnoRet: ptr(uint(28)),
						Args: []specs.LinuxSeccompArg{{Index: 0, Value: 2, Op: specs.OpEqualTo}},
					}},
				}
			},
			command: "ping -c1 127.0.0.1 2>&1 | grep -o 'No space.*'; logger -s x 2>&1 | grep -c 'No space'; true",
			stdout:  lines("No space left on device", "0"),
		},
		{
			name:    "rlimits",
			spec:    func(s *specs.Spec) { rlimit("RLIMIT_CORE", 1024, 2048)(s); rlimit("RLIMIT_FSIZE", 4096, 8192)(s) },
			command: "ulimit -Sn; ulimit -Hn; ulimit -Sc; ulimit -Hc; ulimit -n 2000 2>/dev/null || echo no; dd if=/dev/zero of=/run/x bs=1k count=10 2>/dev/null; echo $?; wc -c < /run/x",
			// ulimit -c counts in blocks of 512 bytes; 153 is SIGXFSZ.
			stdout: lines("1024", "1024", "2", "4", "no", "153", "4096"),
		},
	})
}

// allCaps are the capabilities that Linux 5.9 and later have.
func allCaps() []string {
	return strings.Fields(`CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID
		CAP_SETUID CAP_SETPCAP CAP_LINUX_IMMUTABLE CAP_NET_BIND_SERVICE CAP_NET_BROADCAST CAP_NET_ADMIN CAP_NET_RAW
		CAP_IPC_LOCK CAP_IPC_OWNER CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_CHROOT CAP_SYS_PTRACE CAP_SYS_PACCT
		CAP_SYS_ADMIN CAP_SYS_BOOT CAP_SYS_NICE CAP_SYS_RESOURCE CAP_SYS_TIME CAP_SYS_TTY_CONFIG CAP_MKNOD CAP_LEASE
		CAP_AUDIT_WRITE CAP_AUDIT_CONTROL CAP_SETFCAP CAP_MAC_OVERRIDE CAP_MAC_ADMIN CAP_SYSLOG CAP_WAKE_ALARM
		CAP_BLOCK_SUSPEND CAP_AUDIT_READ CAP_PERFMON CAP_BPF CAP_CHECKPOINT_RESTORE`)
}
