package guestspec

import (
	"os"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/vmrt/vmrt/api"
)

// number is the identity of a character device.
type number struct{ major, minor int64 }

// portableNumbers are character devices with a number that every kernel gives
// the same function, and which stand for no piece of hardware (Linux,
// Documentation/admin-guide/devices.txt and include/linux/miscdevice.h). What
// a container wants of the host's it gets from the guest's.
var portableNumbers = map[number]bool{
	{1, 3}: true, {1, 5}: true, {1, 7}: true, // null, zero, full
	{1, 8}: true, {1, 9}: true, {1, 11}: true, // random, urandom, kmsg
	{5, 0}: true, {5, 2}: true, // tty, ptmx
	{10, 183}: true, {10, 200}: true, {10, 203}: true, // hwrng, net/tun, cuse
	{10, 223}: true, {10, 229}: true, {10, 232}: true, // uinput, fuse, kvm
	{10, 234}: true, {10, 235}: true, {10, 236}: true, // btrfs-control, autofs, mapper/control
	{10, 237}: true, {10, 238}: true, {10, 239}: true, // loop-control, vhost-net, uhid
	{10, 241}: true, {108, 0}: true, // vhost-vsock, ppp
}

// portablePaths are such devices with a number that each boot may choose anew.
var portablePaths = []string{"/dev/userfaultfd", "/dev/udmabuf"}

// portable reports whether a device of the guest can stand for the host's
// device of the same number or, with a number of its own, path.
func portable(d *api.Device) bool {
	return d.GetType() == "c" &&
		(portableNumbers[number{d.GetMajor(), d.GetMinor()}] || slices.Contains(portablePaths, d.GetPath()))
}

// rewriteDevices sets out.Devices, and the rules in out.Resources where a
// device has another number in the guest.
func rewriteDevices(out *specs.Linux, src *specs.Spec, guest []*api.Device, rep *report) error {
	privileged := isPrivileged(src)
	var dropped []string
	for _, d := range src.Linux.Devices {
		g, err := guestDevice(d, guest)
		switch {
		case err != nil:
			return err
		case g != nil:
			if out.Resources != nil {
				renumber(out.Resources.Devices, d, *g)
			}
			out.Devices = append(out.Devices, *g)
		case privileged:
			dropped = append(dropped, d.Path)
		default:
			return unsupported("device %s: not present in the virtual machine", d.Path)
		}
	}
	if len(dropped) > 0 {
		rep.warn("privileged container: %d devices of the host are not present in the virtual machine, %s the first; it gets the virtual machine's devices",
			len(dropped), dropped[0])
	}
	if privileged {
		out.Devices = appendGuestDevices(out.Devices, guest)
	}
	return nil
}

// guestDevice returns what stands for d in the guest, or nil.
func guestDevice(d specs.LinuxDevice, guest []*api.Device) (*specs.LinuxDevice, error) {
	switch {
	case d.Path == "":
		return nil, invalid("device %s %d:%d: no path", d.Type, d.Major, d.Minor)
	case d.Type == "p":
		return &d, nil // A FIFO is made afresh.
	case d.Type != "c" && d.Type != "u" && d.Type != "b":
		return nil, invalid("invalid device type %q", d.Type)
	case d.Type == "b":
		return nil, nil // A disk of the guest is never the host's of the same number.
	}
	for _, g := range guest {
		if !portable(g) {
			continue
		}
		same := g.GetMajor() == d.Major && g.GetMinor() == d.Minor
		if same && portableNumbers[number{d.Major, d.Minor}] || g.GetPath() == d.Path && slices.Contains(portablePaths, d.Path) {
			d.Type, d.Major, d.Minor = "c", g.GetMajor(), g.GetMinor()
			return &d, nil
		}
	}
	return nil, nil
}

// renumber makes rules for the host's device rules for the guest's.
func renumber(rules []specs.LinuxDeviceCgroup, host, guest specs.LinuxDevice) {
	for i, r := range rules {
		if r.Type == guest.Type && r.Major != nil && r.Minor != nil && *r.Major == host.Major && *r.Minor == host.Minor {
			rules[i].Major, rules[i].Minor = &guest.Major, &guest.Minor
		}
	}
}

// isPrivileged reports whether the container has access to every device and
// may administrate the system, as only privileged containers have and may.
func isPrivileged(s *specs.Spec) bool {
	c := s.Process.Capabilities
	if c == nil || !slices.Contains(c.Bounding, "CAP_SYS_ADMIN") || s.Linux.Resources == nil {
		return false
	}
	all := false
	for _, r := range s.Linux.Resources.Devices {
		// Later rules add to what earlier ones allow, unless they deny all.
		if (r.Type == "" || r.Type == "a") && r.Major == nil && r.Minor == nil {
			all = r.Allow && strings.Contains(r.Access, "r") && strings.Contains(r.Access, "w")
		}
	}
	return all
}

// perContainer are device nodes that the OCI runtime makes for each container.
var perContainer = []string{"/dev/console", "/dev/ptmx", "/dev/pts", "/dev/shm", "/dev/mqueue"}

// appendGuestDevices adds the guest's devices that the list does not name.
func appendGuestDevices(list []specs.LinuxDevice, guest []*api.Device) []specs.LinuxDevice {
	for _, g := range guest {
		p := g.GetPath()
		if !strings.HasPrefix(p, "/dev/") || g.GetType() != "c" && g.GetType() != "b" ||
			slices.ContainsFunc(perContainer, func(dir string) bool { return below(p, dir) }) ||
			slices.ContainsFunc(list, func(d specs.LinuxDevice) bool { return d.Path == p }) {
			continue
		}
		mode := os.FileMode(g.GetMode() & 0o777)
		list = append(list, specs.LinuxDevice{Path: p, Type: g.GetType(), Major: g.GetMajor(), Minor: g.GetMinor(), FileMode: &mode})
	}
	return list
}
