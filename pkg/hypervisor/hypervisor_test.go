package hypervisor

import (
	"os"
	"strings"
	"testing"
)

func valid() Spec {
	f := os.Stdin
	return Spec{
		Name: "web", Accelerator: TCG, CPUs: 1, MemoryMiB: 64, Kernel: "/k", Initrd: "/i",
		Cmdline: []string{"a=b", `c="d e"`},
		Vsock:   Vsock{CID: 3, VhostFD: f},
		Shares:  []Share{{Tag: "a", Socket: f}, {Tag: strings.Repeat("b", 36), Socket: f}},
		NICs: []NIC{
			{MAC: "02:00:00:00:00:01", Tap: []*os.File{f}},
			{MAC: "02:00:00:00:00:02", Tap: []*os.File{f, f}, VhostNet: []*os.File{f, f}},
		},
	}
}

func TestValidate(t *testing.T) {
	f := os.Stdin
	tests := map[string]struct {
		change func(*Spec)
		want   string // "" is valid
	}{
		"as it is":              {func(*Spec) {}, ""},
		"no devices":            {func(s *Spec) { s.Shares, s.NICs, s.Cmdline = nil, nil, nil }, ""},
		"largest":               {func(s *Spec) { s.CPUs, s.MemoryMiB, s.Vsock.CID = 64, 1<<20, 1<<32-2 }, ""},
		"vhost-user":            {func(s *Spec) { s.Vsock.VhostFD, s.Vsock.Backend = nil, f }, ""},
		"stream":                {func(s *Spec) { s.NICs[0] = NIC{MAC: s.NICs[0].MAC, Stream: f} }, ""},
		"no name":               {func(s *Spec) { s.Name = "" }, `vm spec: name ""`},
		"name with an end":      {func(s *Spec) { s.Name = "a\nb" }, `vm spec: name "a\nb"`},
		"auto":                  {func(s *Spec) { s.Accelerator = Auto }, `vm spec: accelerator "auto": want "kvm" or "tcg"`},
		"no accelerator":        {func(s *Spec) { s.Accelerator = "" }, `vm spec: accelerator ""`},
		"no CPU":                {func(s *Spec) { s.CPUs = 0 }, "vm spec: 0 CPUs: want 1 to 64"},
		"65 CPUs":               {func(s *Spec) { s.CPUs = 65 }, "vm spec: 65 CPUs: want 1 to 64"},
		"little memory":         {func(s *Spec) { s.MemoryMiB = 63 }, "vm spec: 63 MiB of memory: want at least 64"},
		"no kernel":             {func(s *Spec) { s.Kernel = "" }, "vm spec: no kernel or no initrd"},
		"no initrd":             {func(s *Spec) { s.Initrd = "" }, "vm spec: no kernel or no initrd"},
		"empty argument":        {func(s *Spec) { s.Cmdline = []string{""} }, `vm spec: kernel argument ""`},
		"argument with zero":    {func(s *Spec) { s.Cmdline = []string{"a\x00b"} }, `vm spec: kernel argument "a\x00b"`},
		"host's CID":            {func(s *Spec) { s.Vsock.CID = 2 }, "vm spec: vsock CID 2 is reserved"},
		"any CID":               {func(s *Spec) { s.Vsock.CID = 1<<32 - 1 }, "vm spec: vsock CID 4294967295 is reserved"},
		"no vsock":              {func(s *Spec) { s.Vsock.VhostFD = nil }, "vm spec: want either a vhost descriptor or a vhost-user backend for vsock"},
		"two vsocks":            {func(s *Spec) { s.Vsock.Backend = f }, "vm spec: want either a vhost descriptor or a vhost-user backend for vsock"},
		"share without tag":     {func(s *Spec) { s.Shares[0].Tag = "" }, `vm spec: share ""`},
		"share with a long tag": {func(s *Spec) { s.Shares[0].Tag = strings.Repeat("x", 37) }, "vm spec: share \"" + strings.Repeat("x", 37)},
		"share without socket":  {func(s *Spec) { s.Shares[1].Socket = nil }, "vm spec: share"},
		"two shares of a tag":   {func(s *Spec) { s.Shares[1].Tag = "a" }, `vm spec: share "a": the tag is used twice`},
		"no MAC":                {func(s *Spec) { s.NICs[1].MAC = "" }, `vm spec: interface 1: MAC "": want six octets`},
		"long MAC":              {func(s *Spec) { s.NICs[0].MAC = "02:00:00:00:00:00:00:01" }, `vm spec: interface 0: MAC "02:00:00:00:00:00:00:01": want six octets`},
		"MAC with more options": {func(s *Spec) { s.NICs[0].MAC = "02:00:00:00:00:01,x=y" }, `vm spec: interface 0: MAC`},
		"group MAC":             {func(s *Spec) { s.NICs[0].MAC = "01:00:5e:00:00:01" }, "vm spec: interface 0: MAC 01:00:5e:00:00:01 is a group address"},
		"no tap":                {func(s *Spec) { s.NICs[0].Tap = nil }, "vm spec: interface 0: no tap descriptor"},
		"nil tap":               {func(s *Spec) { s.NICs[1].Tap[1] = nil }, "vm spec: interface 1: no tap descriptor"},
		"queue without vhost":   {func(s *Spec) { s.NICs[1].VhostNet = s.NICs[1].VhostNet[:1] }, "vm spec: interface 1: 1 vhost-net descriptors for 2 queues"},
		"stream and tap":        {func(s *Spec) { s.NICs[0].Stream = f }, "vm spec: interface 0: both a stream and a tap"},
		"nil vhost":             {func(s *Spec) { s.NICs[1].VhostNet[0] = nil }, "vm spec: interface 1: 2 vhost-net descriptors for 2 queues"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := valid()
			tt.change(&s)
			err := s.Validate()
			if tt.want == "" && err != nil {
				t.Errorf("Validate() = %v; want nil", err)
			}
			if tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)) {
				t.Errorf("Validate() = %v; want %q", err, tt.want)
			}
		})
	}
}

func TestSharedMemory(t *testing.T) {
	f := os.Stdin
	tests := map[string]struct {
		spec Spec
		want bool
	}{
		"kernel's vsock":           {Spec{Vsock: Vsock{VhostFD: f}}, false},
		"vhost-user vsock":         {Spec{Vsock: Vsock{Backend: f}}, true},
		"kernel's vsock and share": {Spec{Vsock: Vsock{VhostFD: f}, Shares: []Share{{Tag: "a", Socket: f}}}, true},
		"kernel's vsock and net":   {Spec{Vsock: Vsock{VhostFD: f}, NICs: []NIC{{Tap: []*os.File{f}, VhostNet: []*os.File{f}}}}, false},
	}
	for name, tt := range tests {
		if got := tt.spec.SharedMemory(); got != tt.want {
			t.Errorf("%s: SharedMemory() = %v; want %v", name, got, tt.want)
		}
	}
}
