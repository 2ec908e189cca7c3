package guestspec

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// invalid returns an error about malformed input.
func invalid(format string, args ...any) error {
	return errdefs.ErrInvalidArgument.WithMessage(fmt.Sprintf(format, args...))
}

// unsupported returns an error about a feature that a virtual machine lacks.
func unsupported(format string, args ...any) error {
	return errdefs.ErrNotImplemented.WithMessage(fmt.Sprintf(format, args...))
}

// report collects what is left out without an error.
type report struct {
	warnings, notes []string
}

// warn records that the user does not get what the spec asks for.
func (r *report) warn(format string, args ...any) {
	r.warnings = append(r.warnings, fmt.Sprintf(format, args...))
}

// note records that something without a meaning in the guest was left out.
func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}
