package sandbox

import (
	"context"
	"fmt"

	"github.com/containerd/log"

	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/hostnet"
	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// hostNetNS is the path of the host's network namespace: the one in which
// containerd, and so this process, runs.
const hostNetNS = "/proc/self/ns/net"

// hostNetwork is how a pod has the host's network: out through passt, in
// through what listens in the guest.
type hostNetwork struct {
	template *hostnet.Template
	binary   string         // of passt
	passt    *hostnet.Passt // nil until open, and where there is no interface
}

// newHostNetwork finds out what the host's network is and whether the pod can
// have it. Nothing has to be undone.
func newHostNetwork(settings *config.Config) (*hostNetwork, error) {
	// This process is in the host's network namespace.
	t, err := hostnet.Find()
	if err != nil {
		return nil, err
	}
	h := &hostNetwork{template: t}
	if t.Interface == "" {
		return h, nil
	}
	if h.binary, err = settings.FindPasst(); err != nil {
		return nil, fmt.Errorf("%w: %w", hostnet.ErrNoPasst, err)
	}
	return h, nil
}

// open starts passt. A host without any interface but loopback needs none.
func (h *hostNetwork) open(ctx context.Context, s *Sandbox) (err error) {
	logger := log.G(ctx).WithField("sandbox", s.cfg.ID)
	if h.template.Interface == "" {
		logger.Warn("the host's network is its loopback interface alone, and so is the pod's")
		return nil
	}
	h.passt, err = hostnet.StartPasst(ctx, s.ns, hostnet.PasstConfig{
		Binary: h.binary, Credential: credential(s.cfg.Namespace, s.cfg.ID), Template: h.template,
	})
	return err
}

func (h *hostNetwork) nics() []hypervisor.NIC {
	if h.passt == nil {
		return nil
	}
	return []hypervisor.NIC{h.passt.NIC()}
}

func (h *hostNetwork) releaseNICs() {
	if h.passt != nil {
		h.passt.ReleaseFile()
	}
}

// done is closed when the pod has lost the host's network.
func (h *hostNetwork) done() <-chan struct{} {
	if h == nil || h.passt == nil {
		return nil
	}
	return h.passt.Done()
}

// close ends passt. The virtual machine has ended.
func (h *hostNetwork) close() {
	if h.passt != nil {
		h.passt.Close()
	}
}
