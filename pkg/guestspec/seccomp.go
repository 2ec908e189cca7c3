package guestspec

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// rewriteSeccomp keeps the filter whole and gives it a name of its own.
//
// crun keeps the programs that it has compiled, for all containers of a
// virtual machine, under a checksum of the filter that leaves out the error
// numbers of rules and where one name ends and the next begins (crun 1.21,
// seccomp.c, calculate_seccomp_checksum). A container could so get the filter
// of another. A last rule with the hash of all that the filter says sets them
// apart; its action is the default one, and such rules are compiled to
// nothing, whatever they name.
func rewriteSeccomp(s *specs.LinuxSeccomp) (*specs.LinuxSeccomp, error) {
	if s == nil {
		return nil, nil
	}
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	s.Syscalls = append(s.Syscalls, specs.LinuxSyscall{
		Names: []string{"vmrt-" + hex.EncodeToString(sum[:])}, Action: s.DefaultAction,
	})
	return s, nil
}
