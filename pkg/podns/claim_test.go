//go:build linux

package podns_test

import (
	"errors"
	"testing"

	"github.com/vmrt/vmrt/pkg/podns"
	"github.com/vmrt/vmrt/pkg/podns/podnstest"
)

func TestClaimNet(t *testing.T) {
	first := podnstest.Open(t, podns.Config{})
	if err := first.ClaimNet(); err != nil {
		t.Fatal(err)
	}
	second := podnstest.Open(t, podns.Config{NetNS: first.NetPath()})
	if err := second.ClaimNet(); !errors.Is(err, podns.ErrNetInUse) {
		t.Errorf("ClaimNet() in another pod's network namespace = %v; want ErrNetInUse", err)
	}
	f, err := first.Net()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	// The namespace lives on, and is free.
	if err := second.ClaimNet(); err != nil {
		t.Errorf("ClaimNet() after the first pod's end = %v; want nil", err)
	}
}

func TestClaimHostNet(t *testing.T) {
	ns := podnstest.Open(t, podns.Config{NetNS: "/proc/self/ns/net"})
	if err := ns.ClaimNet(); !errors.Is(err, podns.ErrHostNet) {
		t.Errorf("ClaimNet() in the host's network namespace = %v; want ErrHostNet", err)
	}
}
