//go:build linux

package relay

// CopyStream is one direction, with a time of silence of the test's.
var CopyStream = copyStream

// IdleSize is what a silent direction holds.
const IdleSize = idleSize
