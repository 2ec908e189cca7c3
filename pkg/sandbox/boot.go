package sandbox

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/hypervisor"
	"github.com/vmrt/vmrt/pkg/hypervisor/accel"
	"github.com/vmrt/vmrt/pkg/hypervisor/qemu"
	"github.com/vmrt/vmrt/pkg/idmap"
	"github.com/vmrt/vmrt/pkg/storage"
	"github.com/vmrt/vmrt/pkg/version"
	"github.com/vmrt/vmrt/pkg/vsock"
)

// seedBytes is what the guest's random generator is given at boot; the kernel
// counts 32 bytes as fully seeded (drivers/char/random.c, BLAKE2S_HASH_SIZE).
const seedBytes = 64

// Boot starts the virtual machine and returns when its agent can be used. It
// takes at most the configured boot timeout. After an error the caller calls
// Stop.
func (s *Sandbox) Boot(ctx context.Context) error {
	timeout := s.cfg.Settings.BootTimeout
	ctx, cancel := context.WithTimeoutCause(ctx, timeout,
		fmt.Errorf("guest was not ready within %s (boot_timeout)", timeout))
	defer cancel()
	// A virtual machine that ends early ends every wait for it.
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		select {
		case <-s.dead:
			stop()
		case <-ctx.Done():
		}
	}()
	if err := s.bootSteps(ctx); err != nil {
		err = s.explain(ctx, err)
		return fmt.Errorf("boot virtual machine of sandbox %s: %w", s.cfg.ID, err)
	}
	boot := s.Info()
	log.G(ctx).WithFields(log.Fields{
		"sandbox": s.cfg.ID, "kernel": boot.Kernel, "release": boot.Release,
		"accelerator": boot.Accelerator, "reason": boot.AcceleratorReason,
		"vsock": boot.Transport, "cid": boot.CID, "pid": boot.VMPid,
		"prepared": boot.Prepared, "booted": boot.Booted, "connected": boot.Connected,
	}).Info("virtual machine is ready")
	return nil
}

// explain returns why the boot has failed: the end of the VM says more than the
// read that it broke, and comes just after it.
func (s *Sandbox) explain(ctx context.Context, err error) error {
	if errors.Is(err, errRefused) {
		return err // the guest stops because of it
	}
	if s.machine() != nil && ctx.Err() == nil && !errdefs.IsInvalidArgument(err) { // that is an answer
		select {
		case <-s.dead:
		case <-ctx.Done():
		case <-time.After(2 * vmEndGrace): // watch waits as well
		}
	}
	select {
	case <-s.dead:
		if cause := s.Err(); cause != nil {
			return fmt.Errorf("%w (%w)", cause, err)
		}
	default:
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
	return err
}

func (s *Sandbox) bootSteps(ctx context.Context) error {
	begin := time.Now()
	spec, err := s.prepare(ctx)
	if err != nil {
		return err
	}
	launch := time.Now()
	if err := s.launch(ctx, spec); err != nil {
		return err
	}
	if err := s.greet(ctx); err != nil {
		return err
	}
	hello := time.Now()
	conn, err := s.transport.Dial(ctx, api.PortRPC)
	if err != nil {
		return fmt.Errorf("connect to agent: %w", err)
	}
	s.rpc = newRPC(conn, requestTimeout, func(fault error) {
		s.agentFault = fault
		close(s.agentGone)
	})
	if err := s.setUpGuest(ctx); err != nil {
		return err
	}
	s.learn(func(b *BootInfo) {
		b.Prepared, b.Booted, b.Connected = launch.Sub(begin), hello.Sub(launch), time.Since(hello)
	})
	go s.keepClock()
	return nil
}

// setUpGuest makes the guest ready for containers.
func (s *Sandbox) setUpGuest(ctx context.Context) error {
	// CPUs come online one by one, beside the rest.
	online := make(chan error, 1)
	go func() {
		if s.cfg.CPUs == 1 {
			online <- nil
			return
		}
		_, err := s.Agent().OnlineCPUs(ctx, &api.OnlineCPUsRequest{Count: uint32(s.cfg.CPUs)})
		online <- wrap("bring CPUs of the guest online", err)
	}()
	_, err := s.Agent().Mount(ctx, &api.MountRequest{Mounts: []*api.MountSpec{
		{Type: "virtiofs", Source: api.ShareTag, Target: api.GuestShare},
	}})
	err = wrap("mount shared folder in guest", err)
	if err == nil {
		err = s.configureNetwork(ctx)
	}
	if err == nil && s.cfg.Pod != nil {
		_, err = s.Agent().OpenPod(ctx, s.cfg.Pod)
		err = wrap("make the pod's namespaces in guest", err)
	}
	switch {
	case err != nil:
	case s.host != nil:
		err = s.host.mirror(ctx, s)
	case s.cfg.Pod != nil:
		err = s.forwardPorts(ctx)
	}
	return errors.Join(err, <-online)
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, errgrpc.ToNative(fromGuest(err)))
}

// prepare decides what to boot and starts the virtual machine's helpers.
func (s *Sandbox) prepare(ctx context.Context) (*hypervisor.Spec, error) {
	settings := s.cfg.Settings
	guest, err := settings.Guest()
	if err != nil {
		return nil, err
	}
	verdict, err := accel.Choose(ctx, settings.Accelerator, accel.Config{})
	if err != nil {
		return nil, err
	}
	if s.transport, err = vsock.Open(settings.Vsock); err != nil {
		return nil, fmt.Errorf("open vsock: %w", err)
	}
	if err := s.openNetwork(ctx); err != nil {
		return nil, err
	}
	virtiofsd, err := settings.FindVirtiofsd()
	if err != nil {
		return nil, err
	}
	if s.daemon, err = storage.StartDaemon(ctx, s.ns, storage.DaemonConfig{Binary: virtiofsd, Share: s.share}); err != nil {
		return nil, err
	}
	s.learn(func(b *BootInfo) {
		*b = BootInfo{
			Kernel: guest.Kind, Accelerator: verdict.Accelerator, AcceleratorReason: verdict.Reason,
			Transport: s.transport.Name(), CID: s.transport.CID(),
		}
	})
	return &hypervisor.Spec{
		Name:           "vmrt-" + s.cfg.ID,
		Accelerator:    verdict.Accelerator,
		CPUs:           s.cfg.CPUs,
		MemoryMiB:      s.cfg.MemoryMiB,
		Kernel:         guest.Kernel,
		Initrd:         guest.Initrd,
		CmdlineDevices: guest.CmdlineDevices,
		Cmdline:        s.cmdline(),
		Vsock:          s.transport.Device(),
		NICs:           s.nics(),
		Shares:         []hypervisor.Share{{Tag: api.ShareTag, Socket: s.daemon.Socket()}},
	}, nil
}

// cmdline returns what the guest's kernel and agent are told.
func (s *Sandbox) cmdline() []string {
	args := []string{
		api.CmdlinePort + "=" + strconv.FormatUint(uint64(s.transport.HostPort()), 10),
		"dummy.numdummies=0", // the pod's interfaces are all that there are
	}
	if s.cfg.CPUs > 1 {
		// The others come online once the guest is ready: not before then
		// does a kernel bring them up in less time than it takes to boot.
		args = append(args, "maxcpus=1")
	}
	if ids := s.cfg.IDs; !ids.IsZero() {
		args = append(args, api.CmdlineUIDs+"="+idmap.Format(ids.UIDs), api.CmdlineGIDs+"="+idmap.Format(ids.GIDs))
	}
	return args
}

// launch starts the VMM and the watch over it.
func (s *Sandbox) launch(ctx context.Context, spec *hypervisor.Spec) error {
	binary, err := s.cfg.Settings.FindQEMU()
	if err != nil {
		return err
	}
	vm, err := qemu.Launch(ctx, qemu.Config{
		Binary:     binary,
		Start:      s.ns.Start,
		Credential: credential(s.cfg.Namespace, s.cfg.ID),
		Console: func(line string) {
			log.G(ctx).WithField("sandbox", s.cfg.ID).Debug("console: " + line)
		},
	}, *spec)
	if err != nil {
		return err
	}
	// The VMM holds its own copies; ours would keep the devices alive after it.
	if f := spec.Vsock.Backend; f != nil {
		f.Close()
	}
	if f := spec.Vsock.VhostFD; f != nil {
		f.Close()
	}
	s.daemon.CloseSocket()
	s.releaseNICs()
	s.mu.Lock()
	s.vm, s.boot.VMPid = vm, vm.Pid()
	s.mu.Unlock()
	go s.watch(vm)
	return nil
}

// watch turns the end of the VMM, of the file system daemon or of the agent
// into the end of the sandbox. It returns once the VMM has ended or somebody
// else has decided to end it.
func (s *Sandbox) watch(vm hypervisor.VM) {
	var why error
	select {
	case <-vm.Done():
		s.die(orUnknown(vm.Err()))
		return
	case <-s.dead:
		return
	case <-s.daemon.Done():
		// Without its files the guest can only hang.
		why = fmt.Errorf("file system daemon ended: %w", orUnknown(s.daemon.Err()))
	case <-s.host.done():
		// A pod that is cut off is of no use, and only a new one can be
		// connected.
		why = fmt.Errorf("connection to the host's network ended: %w", orUnknown(s.host.passt.Err()))
	case <-s.agentGone:
		if why = s.agentFault; why == nil {
			why = errors.New("agent ended its connection")
		}
	}
	// Both come first when the VMM ends, or a guest that panics or powers off:
	// the VMM's end, just after, says more.
	select {
	case <-vm.Done():
		why = orUnknown(vm.Err())
	case <-time.After(vmEndGrace):
	}
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	if err := s.Kill(ctx, why); err != nil {
		log.L.WithError(err).WithField("sandbox", s.cfg.ID).Error("kill virtual machine")
	}
}

// vmEndGrace is how long a guest without an agent may take to end.
const vmEndGrace = time.Second

// killTimeout bounds the wait for a killed process.
const killTimeout = 10 * time.Second

func orUnknown(err error) error {
	if err == nil {
		return errors.New("ended without an error")
	}
	return err
}

// greet waits for the agent's Hello and answers it.
func (s *Sandbox) greet(ctx context.Context) error {
	hello, err := s.hear(ctx)
	if err != nil {
		return err
	}
	welcome, refused := answer(hello)
	if err := api.WriteMessage(s.hello, welcome); err != nil {
		return fmt.Errorf("answer agent's hello: %w", err)
	}
	if refused != nil {
		return refused
	}
	s.learn(func(b *BootInfo) { b.Release = printable(hello.GetKernel(), 64) })
	return s.hello.SetDeadline(time.Time{})
}

// hear returns the agent's Hello and keeps the connection that it came on. An
// attempt to connect that the guest gave up, because a signal interrupted it or
// because this host was slow to answer, is still a connection here, which ends
// without a word: the agent tries again.
func (s *Sandbox) hear(ctx context.Context) (*api.Hello, error) {
	var given error // what became of the attempt before
	for {
		conn, err := s.transport.Accept(ctx)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("wait for agent: %w", err), given)
		}
		hello, err := readHello(ctx, conn)
		if err == nil {
			s.hello = conn
			return hello, nil
		}
		conn.Close()
		given = fmt.Errorf("agent's hello: %w", err)
		if !errors.Is(err, errSilent) {
			return nil, given
		}
	}
}

// errSilent is the end of a connection on which nothing was said.
var errSilent = errors.New("the guest gave up the connection")

func readHello(ctx context.Context, conn net.Conn) (*api.Hello, error) {
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	// One read for the first byte tells silence from a message cut short.
	var first [1]byte
	if _, err := conn.Read(first[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			err = fmt.Errorf("%w: %w", errSilent, err)
		}
		return nil, err
	}
	hello := &api.Hello{}
	return hello, api.ReadMessage(io.MultiReader(bytes.NewReader(first[:]), conn), hello)
}

// errRefused is a guest that this shim does not go on with.
var errRefused = fmt.Errorf("the guest is refused: %w", errdefs.ErrFailedPrecondition)

// answer decides about an agent by its Hello.
func answer(hello *api.Hello) (*api.Welcome, error) {
	if hello.GetProtocol() != api.ProtocolVersion {
		why := fmt.Sprintf("agent %q in the guest's initramfs speaks protocol %d, this shim (%s) %d: install shim and guest files of one release",
			printable(hello.GetVersion(), 64), hello.GetProtocol(), version.Version, api.ProtocolVersion)
		return &api.Welcome{Refused: why}, fmt.Errorf("%s: %w", why, errRefused)
	}
	seed := make([]byte, seedBytes)
	rand.Read(seed)
	// A container that is given no host name has the machine's: with runc that
	// is the host's.
	name, err := os.Hostname()
	if err != nil {
		err = fmt.Errorf("find the host's name: %w", err)
		return &api.Welcome{Refused: "the host has an error of its own"}, err
	}
	return &api.Welcome{Time: timestamppb.Now(), Seed: seed, Hostname: name}, nil
}
