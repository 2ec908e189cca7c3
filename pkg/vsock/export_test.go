package vsock

// ClaimCID is claimCID.
var ClaimCID = claimCID
