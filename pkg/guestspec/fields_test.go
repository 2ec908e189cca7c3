package guestspec

import (
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestEveryFieldIsDecided fails when a newer runtime-spec has a field that
// this package has no rule for.
func TestEveryFieldIsDecided(t *testing.T) {
	for _, tt := range []struct {
		of   any
		want []string
	}{
		{specs.Spec{}, []string{"Version", "Process", "Root", "Hostname", "Domainname", "Mounts", "Hooks", "Annotations",
			"Linux", "Solaris", "Windows", "VM", "ZOS", "FreeBSD"}},
		{specs.Process{}, []string{"Terminal", "ConsoleSize", "User", "Args", "CommandLine", "Env", "Cwd", "Capabilities",
			"Rlimits", "NoNewPrivileges", "ApparmorProfile", "OOMScoreAdj", "Scheduler", "SelinuxLabel", "IOPriority",
			"ExecCPUAffinity"}},
		{specs.Root{}, []string{"Path", "Readonly"}},
		{specs.Mount{}, []string{"Destination", "Type", "Source", "Options", "UIDMappings", "GIDMappings"}},
		{specs.Hooks{}, []string{"Prestart", "CreateRuntime", "CreateContainer", "StartContainer", "Poststart", "Poststop"}},
		{specs.Linux{}, []string{"UIDMappings", "GIDMappings", "Sysctl", "Resources", "CgroupsPath", "Namespaces", "Devices",
			"NetDevices", "Seccomp", "RootfsPropagation", "MaskedPaths", "ReadonlyPaths", "MountLabel", "IntelRdt",
			"MemoryPolicy", "Personality", "TimeOffsets"}},
		{specs.LinuxSeccomp{}, []string{"DefaultAction", "DefaultErrnoRet", "Architectures", "Flags", "ListenerPath",
			"ListenerMetadata", "Syscalls"}},
		{specs.LinuxNamespace{}, []string{"Type", "Path"}},
		{specs.LinuxDevice{}, []string{"Path", "Type", "Major", "Minor", "FileMode", "UID", "GID"}},
		{specs.LinuxResources{}, []string{"Devices", "Memory", "CPU", "Pids", "BlockIO", "HugepageLimits", "Network", "Rdma", "Unified"}},
		{specs.LinuxMemory{}, []string{"Limit", "Reservation", "Swap", "Kernel", "KernelTCP", "Swappiness",
			"DisableOOMKiller", "UseHierarchy", "CheckBeforeUpdate"}},
		{specs.LinuxCPU{}, []string{"Shares", "Quota", "Burst", "Period", "RealtimeRuntime", "RealtimePeriod", "Cpus", "Mems", "Idle"}},
	} {
		typ := reflect.TypeOf(tt.of)
		var got []string
		for i := range typ.NumField() {
			got = append(got, typ.Field(i).Name)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("fields of %s: decide what becomes of the new ones, here and in doc.go (-want +got):\n%s", typ, diff)
		}
	}
}
