// Package hostcpu reads facts about this machine's processor that the kernel
// does not hand out: how fast the time stamp counter runs, and which processor
// this is.
//
// An emulating VMM shows the guest the host's counter, whose frequency a guest
// cannot learn from it; the host tells it on the kernel command line.
//
// The functions may be called from any goroutine. They are supported on
// linux/amd64 alone and fail with errors.ErrUnsupported elsewhere. Which CPU of
// a heterogeneous machine answers is not specified.
package hostcpu
