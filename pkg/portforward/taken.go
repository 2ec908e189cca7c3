//go:build linux

package portforward

import (
	"fmt"

	"github.com/vmrt/vmrt/pkg/listening"
)

// maxTaken bounds the ports that the program leaves alone.
const maxTaken = 4096

// needDiag is what a kernel lacks that does not list its listening sockets.
const needDiag = "sock_diag of TCP (CONFIG_INET_TCP_DIAG)"

// takenPorts returns the TCP ports on which something listens at loopback or
// at any address in the calling thread's network namespace.
func takenPorts() ([]uint16, error) {
	sockets, err := listening.List()
	if err != nil {
		return nil, unsupported(err, needDiag)
	}
	seen := make(map[uint16]bool)
	var ports []uint16
	for _, s := range sockets {
		ip, port := s.Addr.Addr(), s.Addr.Port()
		if (ip.IsLoopback() || ip.IsUnspecified()) && !seen[port] {
			seen[port] = true
			ports = append(ports, port)
		}
	}
	if len(ports) > maxTaken {
		return nil, fmt.Errorf("%d; at most %d can be left alone", len(ports), maxTaken)
	}
	return ports, nil
}
