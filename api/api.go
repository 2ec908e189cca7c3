// Package api is what the host and the guest of one virtual machine share: the
// vmrt.agent.v1 protocol, the vsock ports, and the guest's folders.
//
// The host never sends a host path to the guest, and the guest's answers are
// untrusted: every limit in this package is enforced by the reader.
package api

import (
	"fmt"
	"path"
)

// ProtocolVersion is raised with every change that an older peer would
// misunderstand. Shim and agent must agree on it exactly.
const ProtocolVersion = 4

// Vsock ports that the agent listens on. The host dials all of them.
const (
	// PortRPC serves ttrpc: vmrt.agent.v1 and containerd.task.v3.
	PortRPC = 1024
	// PortStream takes one connection for each stream; each starts with a
	// stream header (see StreamHeader).
	PortStream = 1025
	// PortDial takes one connection for each one to a TCP port of the guest;
	// each starts with a dial request (see WriteDialRequest).
	PortDial = 1026
)

// MaxNameServers bounds what ServeNames is given in one pod. Programs use the
// first three (resolv.conf(5), MAXNS).
const MaxNameServers = 8

// PortNames is the port of name servers (RFC 1035, section 4.2).
const PortNames = 53

// HostPort is the vsock port on the host that the agent dials with Hello when
// the kernel command line names no other by CmdlinePort.
const HostPort = 1024

// CmdlinePort is the kernel command line key for the host's port.
const CmdlinePort = "vmrt.port"

// CmdlineUIDs and CmdlineGIDs are the kernel command line keys for the ids of
// the pod's user namespace, in the form of idmap.Format. A pod without one has
// neither.
const (
	CmdlineUIDs = "vmrt.uids"
	CmdlineGIDs = "vmrt.gids"
)

// MaxHello bounds the length of an encoded Hello or Welcome.
const MaxHello = 64 << 10

// The guest's folders.
const (
	// GuestRun is a tmpfs that holds everything of the agent.
	GuestRun = "/run/vmrt"
	// GuestShare is where the host's shared folder is mounted.
	GuestShare = GuestRun + "/share"
	// GuestBundles holds one OCI bundle for each container.
	GuestBundles = GuestRun + "/bundles"
	// PodNamespaces holds the namespaces that a pod's containers share, one
	// file each: ipc, uts, pid, user.
	PodNamespaces = GuestRun + "/pod/ns"
	// PodShm is the tmpfs that is a pod's /dev/shm.
	PodShm = GuestRun + "/pod/shm"
	// ShareTag is the virtio-fs tag of the shared folder.
	ShareTag = "vmrt"
	// Runtime is the OCI runtime's path in the initramfs.
	Runtime = "/bin/crun"
)

// What a NetworkConfig holds at most. It is far more than pods have, and far
// less than a ttrpc message of 4 MiB could carry.
const (
	MaxInterfaces = 64
	MaxAddresses  = 256 // of one interface
	MaxRoutes     = 4096
	MaxHops       = 64 // of one route
	MaxNeighbours = 4096
	MaxRules      = 1024
)

// MaxListeningPorts bounds a ListeningPorts.
const MaxListeningPorts = 1024

// isIdentifier is containerd's rule for container and exec ids, which keeps an id
// usable as one path element: letters and digits, with single separators between
// them (pkg/identifiers). It is no regular expression because the agent would
// compile that in every boot.
func isIdentifier(s string) bool {
	separator := true // before the next byte
	for _, b := range []byte(s) {
		switch {
		case '0' <= b && b <= '9', 'A' <= b && b <= 'Z', 'a' <= b && b <= 'z':
			separator = false
		case (b == '.' || b == '_' || b == '-') && !separator:
			separator = true
		default:
			return false
		}
	}
	return !separator
}

// BundlePath returns the guest's bundle folder of a container.
func BundlePath(id string) string { return path.Join(GuestBundles, id) }

// CheckID returns an error unless id is a valid container id.
func CheckID(id string) error {
	if len(id) > 76 || !isIdentifier(id) {
		return fmt.Errorf("id %q: want at most 76 letters, digits, '.', '_' and '-'", id)
	}
	return nil
}
