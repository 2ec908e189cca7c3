// Package report is what the probe in a virtual machine tells the test on the
// host.
package report

const (
	// Mark is the first line on the guest's console.
	Mark = "vmrt-probe: init runs"
	// PortArg is the kernel argument with the host's vsock port.
	PortArg = "vmrt.probe="
	// Tag names the shared folder.
	Tag = "probe"
)

// Report is what a guest's kernel can do.
type Report struct {
	Release string
	// Boot and Late are the modules of each list that failed, with reasons.
	Boot, Late map[string]string
	// Drivers are by virtio device type: "0x0013" is vsock.
	Drivers     map[string]string
	FileSystems []string
	// Xtables are what /proc/net lists of iptables, by file: "ip_tables_targets".
	Xtables map[string][]string
	// Works has an empty string for each thing that works, else the reason.
	Works       map[string]string
	Controllers []string
	CPUs        int
	Clock       string
}
