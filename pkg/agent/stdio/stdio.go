// Package stdio joins the stream connections of a host to the stdio of
// processes.
//
// A Registry takes in connections, each named by a stream header, and holds
// them until a request names them. Open makes the pipes of one process and
// returns a Process, whose methods say how far the process has come:
//
//	Files, Handed   a command that makes the process is started with them
//	Started         the process runs; bytes flow
//	Drain           the process has ended; its output is awaited
//	Deleted         nobody is interested in more output
//	Abort           the process never ran; everything is closed
//
// A terminal's bytes pass through the task service, which opens FIFOs for it.
//
// Contract: bytes are neither lost nor reordered as long as the host reads.
// End of input (the host's half-close) reaches the process after the last
// byte before it. End of output is a half-close towards the host. A host that
// does not read delays nothing but its own stream, and Deleted bounds that.
//
// Not guaranteed: delivery to a host that stops reading for longer than
// Limits.Linger after Deleted, or of what a child of the process writes later.
//
// All methods may be called from any goroutine; the ones that end something
// may be called twice.
package stdio

import (
	"net"
	"syscall"
	"time"
)

// Conn is one stream connection, such as a *vsock.Conn or a *net.UnixConn.
type Conn interface {
	net.Conn
	syscall.Conn
	// CloseWrite ends the direction towards the host.
	CloseWrite() error
}

// Limits bounds what the host can make the guest hold and wait for.
type Limits struct {
	// Unclaimed is the number of connections that no request has named yet.
	Unclaimed int
	// Header is the time that a connection has to send its header.
	Header time.Duration
	// Claim is the time in which a request must name a connection.
	Claim time.Duration
	// Linger is how long, after Deleted, one read or write may make no
	// progress before the stream is given up.
	Linger time.Duration
	// PipeSize is the capacity of each pipe in bytes. The kernel allocates
	// it as it fills.
	PipeSize int
}

// DefaultLimits returns the limits that the agent runs with.
func DefaultLimits() Limits {
	return Limits{
		Unclaimed: 1024,
		Header:    10 * time.Second,
		Claim:     60 * time.Second,
		Linger:    10 * time.Second,
		PipeSize:  256 << 10,
	}
}
