package conformance

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func bind(source, destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind"}, options...)}
}

// withMounts is an option for a shell that waits, with these mounts.
func withMounts(mounts ...specs.Mount) options {
	return options{spec: func(s *specs.Spec) {
		s.Process.Args = []string{"sleep", "1000"}
		s.Mounts = append(s.Mounts, mounts...)
	}}
}

// shell runs a command in the container and wants it to print this.
func (s *shim) wantShell(id, command, want string) {
	s.t.Helper()
	out, errs, status := s.exec(id, "sh", "-c", command)
	if out != want || status != 0 {
		s.t.Errorf("%s = %q, stderr %q, status %d; want %q", command, out, errs, status, want)
	}
}

func TestBindMounts(t *testing.T) {
	host := t.TempDir()
	for _, d := range []string{"rw", "ro", "files"} {
		if err := os.Mkdir(filepath.Join(host, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(host, "rw/seen"), "from host\n", 0o644)
	write(t, filepath.Join(host, "ro/seen"), "read only\n", 0o644)
	write(t, filepath.Join(host, "files/one"), "one\n", 0o644)
	write(t, filepath.Join(host, "files/secret"), "secret\n", 0o644)
	s := newShim(t, withMounts(
		bind(filepath.Join(host, "rw"), "/rw", "rw"),
		bind(filepath.Join(host, "ro"), "/ro", "ro"),
		bind(filepath.Join(host, "files/one"), "/etc/one", "rw"),
	))
	s.mustCreate(nil, false)
	s.mustStart("")

	s.wantShell("read", "cat /rw/seen /ro/seen /etc/one", "from host\nread only\none\n")
	s.wantShell("ro", "touch /ro/x 2>&1 | grep -o 'Read-only file system'", "Read-only file system\n")
	// Only the file that was named is anywhere to be seen.
	s.wantShell("sibling", "find / -xdev -name secret; find /rw /ro /etc -name secret", "")

	s.wantShell("write", "echo from guest > /rw/guest; echo changed > /etc/one", "")
	for file, want := range map[string]string{"rw/guest": "from guest\n", "files/one": "changed\n"} {
		if got, err := os.ReadFile(filepath.Join(host, file)); err != nil || string(got) != want {
			t.Errorf("on the host, %s = %q, %v; want %q", file, got, err, want)
		}
	}
	write(t, filepath.Join(host, "rw/late"), "late\n", 0o644)
	s.wantShell("late", "cat /rw/late", "late\n")
	write(t, filepath.Join(host, "rw/seen"), "changed on the host\n", 0o644)
	s.wantShell("changed", "i=0; until grep -q 'on the host' /rw/seen || [ $i = 50 ]; do sleep 0.1; i=$((i+1)); done; cat /rw/seen", "changed on the host\n")
}

// A socket of the host can be mounted, and does not lead there: the log says so.
func TestSocketMount(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := newShim(t, withMounts(bind(path, "/run/socket")))
	s.mustCreate(nil, false)
	s.mustStart("")
	s.wantShell("kind", "stat -c %F /run/socket", "socket\n")
	if want := "mount " + path + " at /run/socket: a socket or FIFO"; !strings.Contains(s.log.String(), want) {
		t.Errorf("the log lacks %q:\n%s", want, s.log)
	}
}

// rro holds for what is mounted below the source, too. So does ro, other than
// with runc: the guest mounts what is below on first use, with its parent's
// flags.
func TestRecursiveReadOnly(t *testing.T) {
	host := t.TempDir()
	below := filepath.Join(host, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", below, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(below, syscall.MNT_DETACH) })
	s := newShim(t, withMounts(bind(host, "/ro", "ro"), bind(host, "/rro", "rro")))
	s.mustCreate(nil, false)
	s.mustStart("")
	s.wantShell("top", "touch /ro/x 2>/dev/null || echo no; touch /rro/x 2>/dev/null || echo no", "no\nno\n")
	s.wantShell("below", "touch /ro/below/x && echo yes; touch /rro/below/x 2>/dev/null || echo no", "yes\nno\n")
}

func TestHundredMounts(t *testing.T) {
	host := t.TempDir()
	var mounts []specs.Mount
	var want strings.Builder
	for i := range 100 {
		dir := filepath.Join(host, fmt.Sprint(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "f"), fmt.Sprintln(i), 0o644)
		source, destination := dir, fmt.Sprintf("/m/%03d", i)
		if i%2 == 1 {
			source, destination = filepath.Join(dir, "f"), destination+"/f"
		}
		mounts = append(mounts, bind(source, destination))
		fmt.Fprintln(&want, i)
	}
	s := newShim(t, withMounts(mounts...))
	s.mustCreate(nil, false)
	s.mustStart("")
	s.wantShell("all", "cat /m/*/f", want.String())
}
