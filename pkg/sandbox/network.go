package sandbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/guestdial"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/network"
	"github.com/vmrt/vmrt/pkg/portforward"
)

// configureNetwork tells the guest what is in the pod's network namespace.
func (s *Sandbox) configureNetwork(ctx context.Context) error {
	request := s.networkRequest()
	_, err := s.Agent().ConfigureNetwork(ctx, request)
	return wrap("configure network of guest", err)
}

func (s *Sandbox) networkRequest() *api.NetworkConfig {
	if s.host != nil {
		return s.host.template.Request()
	}
	return s.network.Request()
}

// nics returns the virtual machine's network devices.
func (s *Sandbox) nics() []hypervisor.NIC {
	if s.host != nil {
		return s.host.nics()
	}
	return s.network.NICs()
}

// releaseNICs closes the files of nics, once the VMM has its own.
func (s *Sandbox) releaseNICs() {
	if s.host != nil {
		s.host.releaseNICs()
		return
	}
	s.network.ReleaseFiles()
}

// UpdateNetwork picks up interfaces that have arrived in the pod's network
// namespace since the boot: as many as Config.SpareNICs.
func (s *Sandbox) UpdateNetwork(ctx context.Context) error {
	if s.host != nil {
		return nil
	}
	before := s.network.Request()
	if err := s.network.Update(ctx); err != nil {
		return err
	}
	if proto.Equal(s.network.Request(), before) {
		return nil
	}
	return s.configureNetwork(ctx)
}

// forwardPorts makes the guest's loopback ports reachable on the loopback of
// the pod's network namespace, where container managers look for them. A host
// that cannot do so has pods without port-forward.
func (s *Sandbox) forwardPorts(ctx context.Context) error {
	f, err := portforward.Start(ctx, s.ns, func(ctx context.Context, network string, port uint16) (portforward.Conn, error) {
		return guestdial.Dial(ctx, s.transport, network, port)
	})
	if errors.Is(err, portforward.ErrNotSupported) {
		log.G(ctx).WithError(err).WithField("sandbox", s.cfg.ID).Warn("pod has no port-forward")
		return nil
	}
	if err != nil {
		return fmt.Errorf("forward ports to guest: %w", err)
	}
	s.forwarder = f
	return nil
}

// openNetwork makes the virtual machine's network devices.
func (s *Sandbox) openNetwork(ctx context.Context) (err error) {
	if s.host != nil {
		return s.host.open(ctx, s)
	}
	s.network, err = network.Open(ctx, s.ns, network.Options{Queues: s.cfg.CPUs, Spares: s.cfg.SpareNICs})
	return err
}

// closeNetwork undoes openNetwork, ServeNames, forwardPorts and mirrorPorts. The virtual machine has
// ended.
func (s *Sandbox) closeNetwork(ctx context.Context) error {
	var errs []error
	s.names.close()
	if s.host != nil {
		s.host.close()
	}
	if s.forwarder != nil {
		errs = append(errs, s.forwarder.Close())
	}
	if s.network != nil {
		errs = append(errs, s.network.Close(ctx))
	}
	return errors.Join(errs...)
}
