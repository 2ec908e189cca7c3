package vsock

// For tests of what only a kernel with vhost-vsock does.
var (
	ClaimCID = claimCID
	NotReady = notReady
	Refused  = refused
)
