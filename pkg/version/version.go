// Package version holds what the build says of itself.
package version

// Version is the release, set by the linker.
var Version = "devel"

// Revision is the commit, set by the linker; empty in a plain go build.
var Revision = ""
