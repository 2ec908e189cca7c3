//go:build linux

package portforward

import (
	"errors"
	"fmt"
	"net"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// steering is a program attached to a network namespace. The kernel keeps the
// program and its map for as long as the link.
type steering struct{ link *link.NetNsLink }

// Close detaches the program. Idempotent.
func (s *steering) Close() error { return s.link.Close() }

// Places of the listeners in the socket map.
const (
	keyIPv4 = iota
	keyIPv6
)

// What a kernel lacks that does not know one of the parts.
const (
	needMap     = "socket maps (Linux 5.9, CONFIG_BPF_SYSCALL and CONFIG_INET)"
	needProgram = "sk_lookup programs (Linux 5.9, CONFIG_BPF_SYSCALL and CONFIG_INET)"
)

// steer attaches the program to the namespace.
func steer(ns *namespace) (*steering, error) {
	var s *steering
	err := withMemlock(func() (err error) {
		s, err = attach(ns)
		return err
	})
	return s, err
}

func attach(ns *namespace) (*steering, error) {
	sockets, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "vmrt_forward", Type: ebpf.SockMap, KeySize: 4, ValueSize: 8, MaxEntries: 2,
	})
	if err != nil {
		return nil, fmt.Errorf("make the socket map: %w", unsupported(err, needMap))
	}
	defer sockets.Close()
	for i, l := range ns.listeners {
		if err := put(sockets, uint32(i), l); err != nil {
			return nil, fmt.Errorf("put the listener into the socket map: %w", unsupported(err, needMap))
		}
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "vmrt_forward", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup,
		Instructions: instructions(sockets.FD(), ns.taken),
		License:      "Apache-2.0", // no helper in use asks for the GPL
	})
	if err != nil {
		return nil, fmt.Errorf("load the sk_lookup program: %w", unsupported(err, needProgram))
	}
	defer program.Close()
	l, err := link.AttachNetNs(int(ns.file.Fd()), program)
	if err != nil {
		return nil, fmt.Errorf("attach the sk_lookup program: %w", unsupported(err, needProgram))
	}
	return &steering{l}, nil
}

func put(sockets *ebpf.Map, key uint32, l *net.TCPListener) error {
	rc, err := l.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { err = sockets.Put(key, uint64(fd)) })
	return errors.Join(err, cerr)
}

// Offsets in struct bpf_sk_lookup (include/uapi/linux/bpf.h). Addresses are in
// network byte order, local_port is in the machine's.
const (
	offFamily    = 8
	offProtocol  = 12
	offRemoteIP4 = 16
	offRemoteIP6 = 20
	offLocalIP4  = 40
	offLocalIP6  = 44
	offLocalPort = 60
)

// skPass is SK_PASS: the lookup goes on, with the socket that was assigned if
// one was.
const skPass = 1

// instructions returns the program. It is called for each segment that begins
// a connection, and each datagram without one, and leaves alone whatever is
// not TCP from loopback to loopback or goes to a port that is taken.
func instructions(socketsFD int, taken []uint16) asm.Instructions {
	const (
		ctx    = asm.R6 // kept over calls
		socket = asm.R7
	)
	p := asm.Instructions{
		asm.Mov.Reg(ctx, asm.R1),
		asm.LoadMem(asm.R2, ctx, offProtocol, asm.Word),
		asm.JNE.Imm(asm.R2, unix.IPPROTO_TCP, "pass"),
		asm.LoadMem(asm.R2, ctx, offLocalPort, asm.Word),
	}
	for _, port := range taken {
		p = append(p, asm.JEq.Imm(asm.R2, int32(port), "pass"))
	}
	p = append(p,
		asm.LoadMem(asm.R2, ctx, offFamily, asm.Word),
		asm.JEq.Imm(asm.R2, unix.AF_INET6, "ipv6"),
		asm.JNE.Imm(asm.R2, unix.AF_INET, "pass"),
	)
	for _, off := range []int16{offLocalIP4, offRemoteIP4} {
		p = append(p,
			asm.LoadMem(asm.R2, ctx, off, asm.Word),
			asm.HostTo(asm.BE, asm.R2, asm.Word),
			asm.RSh.Imm(asm.R2, 24),
			asm.JNE.Imm(asm.R2, 127, "pass"),
		)
	}
	p = append(p,
		asm.StoreImm(asm.RFP, -4, keyIPv4, asm.Word),
		asm.Ja.Label("assign"),
		asm.StoreImm(asm.RFP, -4, keyIPv6, asm.Word).WithSymbol("ipv6"),
	)
	for _, off := range []int16{offLocalIP6, offRemoteIP6} {
		for word := range int16(4) {
			p = append(p, asm.LoadMem(asm.R2, ctx, off+4*word, asm.Word))
			if word == 3 {
				p = append(p, asm.HostTo(asm.BE, asm.R2, asm.Word), asm.JNE.Imm(asm.R2, 1, "pass"))
			} else {
				p = append(p, asm.JNE.Imm(asm.R2, 0, "pass"))
			}
		}
	}
	return append(p,
		asm.LoadMapPtr(asm.R1, socketsFD).WithSymbol("assign"),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.Mov.Reg(socket, asm.R0),
		asm.Mov.Reg(asm.R1, ctx),
		asm.Mov.Reg(asm.R2, socket),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnSkAssign.Call(), // fails if another program was first: let it
		asm.Mov.Reg(asm.R1, socket),
		asm.FnSkRelease.Call(),
		asm.Mov.Imm(asm.R0, skPass).WithSymbol("pass"),
		asm.Return(),
	)
}

// withMemlock calls f, and once more with as much lockable memory as may be if
// it lacks a permission: before Linux 5.11 programs and maps were charged to
// the user's RLIMIT_MEMLOCK, all pods' together.
func withMemlock(f func() error) error {
	err := f()
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	var limit unix.Rlimit
	if unix.Prlimit(0, unix.RLIMIT_MEMLOCK, nil, &limit) != nil {
		return err
	}
	for _, more := range []unix.Rlimit{{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}, {Cur: limit.Max, Max: limit.Max}} {
		if more.Cur > limit.Cur && unix.Prlimit(0, unix.RLIMIT_MEMLOCK, &more, nil) == nil {
			defer unix.Prlimit(0, unix.RLIMIT_MEMLOCK, &limit, nil)
			return f()
		}
	}
	return err
}
