// Package tig stands in for the test helper that nerdctl imports from a module
// which exists only inside nerdctl's own repository. Nothing of it is called
// by the nerdctl command.
package tig

// T is the part of testing.TB that nerdctl's helpers name.
type T interface {
	Helper()
	FailNow()
	Fail()
	Log(args ...any)
	Name() string
	TempDir() string
}
