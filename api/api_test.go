package api

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/identifiers"
)

// TestCheckID compares with containerd's own check, whose ids these are: all
// strings of at most five bytes of each kind, and the longest.
func TestCheckID(t *testing.T) {
	ids := []string{strings.Repeat("a", 76), strings.Repeat("a", 77), strings.Repeat("a-", 38), "é", "a\x00"}
	short := []string{""}
	for range 5 {
		var longer []string
		for _, s := range short {
			for _, b := range "aZ9.-_/ \n" {
				longer = append(longer, s+string(b))
			}
		}
		ids = append(ids, short...)
		short = longer
	}
	for _, id := range append(ids, short...) {
		if got, want := CheckID(id), identifiers.Validate(id); (got == nil) != (want == nil) {
			t.Errorf("CheckID(%q) = %v; want as containerd, %v", id, got, want)
		}
	}
}
