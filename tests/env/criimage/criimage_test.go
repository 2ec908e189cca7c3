package criimage

import (
	"testing"

	"github.com/vmrt/vmrt/hack/tools"
)

// critest is built with the digest of an image that is made here.
func TestDigest(t *testing.T) {
	s, err := digestImage().OCI()
	if err != nil {
		t.Fatal(err)
	}
	if s.Digest != tools.TestImageDigest {
		t.Errorf("digest of %s = %s; want %s, which critest asks for", digestName, s.Digest, tools.TestImageDigest)
	}
}
