package task

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestRephrase(t *testing.T) {
	for _, tt := range []struct{ crun, want string }{
		{
			"OCI runtime exec failed: executable file `nope` not found in $PATH: No such file or directory",
			`OCI runtime exec failed: exec: "nope": executable file not found in $PATH`,
		},
		{
			"OCI runtime create failed: executable file `/no/pe` not found in $PATH: No such file or directory",
			`OCI runtime create failed: exec: "/no/pe": stat /no/pe: no such file or directory`,
		},
		{
			"OCI runtime exec failed: the path `/etc/passwd` exists but it is not executable: Operation not permitted",
			`OCI runtime exec failed: exec: "/etc/passwd": permission denied`,
		},
		{
			"OCI runtime create failed: executable file `/no/pe` not found: No such file or directory",
			`OCI runtime create failed: exec: "/no/pe": stat /no/pe: no such file or directory`,
		},
		{
			"OCI runtime exec failed: cannot find `` in $PATH: No such file or directory",
			`OCI runtime exec failed: exec: "": executable file not found in $PATH`,
		},
		{
			"OCI runtime exec failed: the path `/etc` is not a regular file: Operation not permitted",
			`OCI runtime exec failed: exec: "/etc": is a directory`,
		},
		{"OCI runtime exec failed: open executable: Permission denied", "OCI runtime exec failed: exec: permission denied"},
		{"OCI runtime exec failed: open executable: Operation not permitted", "OCI runtime exec failed: exec: permission denied"},
		{
			"OCI runtime exec failed: chdir `/no`: No such file or directory",
			`OCI runtime exec failed: chdir to cwd ("/no") set in config.json failed: no such file or directory`,
		},
		{
			"OCI runtime create failed: chdir to `/etc/passwd`: Not a directory",
			`OCI runtime create failed: chdir to cwd ("/etc/passwd") set in config.json failed: not a directory`,
		},
		{
			"OCI runtime create failed: the sysctl `kernel.x` is not namespaced",
			`OCI runtime create failed: sysctl "kernel.x" is not in a separate kernel namespace`,
		},
		{"error stat'ing file `/x`: No such file or directory", "error stat'ing file `/x`: no such file or directory"},
		{"exec format: Exec format error", "exec format: exec format error"},
		{"container not created", "container not created"},
	} {
		got := rephrase(status.Error(codes.Unknown, tt.crun))
		if st, _ := status.FromError(got); st.Code() != codes.Unknown || st.Message() != tt.want {
			t.Errorf("rephrase(%q) = %v; want %q of the same code", tt.crun, got, tt.want)
		}
	}
	if got := rephrase(nil); got != nil {
		t.Errorf("rephrase(nil) = %v; want nil", got)
	}
}
