package vsock_test

import (
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/vhostuser/vsock"
	"github.com/vmrt/vmrt/pkg/vhostuser/vsock/vsocktest"
)

// Both sides end a connection in both directions in every order of steps.
// Whatever the order, readers come to an end, nothing of the connection is
// left, and what a side wrote before anything ended can be read until the
// reader itself closes.
func TestEndsInAnyOrder(t *testing.T) {
	p := newPair(t, vsock.Config{CloseTimeout: time.Hour}, vsocktest.Config{})
	type ends struct {
		host  *vsock.Conn
		guest *vsocktest.Conn
	}
	steps := []struct {
		name string
		do   func(ends) error
	}{
		{"host sends no more", func(e ends) error { return e.host.CloseWrite() }},
		{"host reads no more", func(e ends) error { return e.host.CloseRead() }},
		{"guest sends no more", func(e ends) error { return e.guest.CloseWrite() }},
		{"guest reads no more", func(e ends) error { return e.guest.CloseRead() }},
	}
	for _, order := range permutations(len(steps)) {
		for _, hostFirst := range []bool{true, false} {
			var names []string
			for _, i := range order {
				names = append(names, steps[i].name)
			}
			t.Run(fmt.Sprintf("%v, host closes first %v", names, hostFirst), func(t *testing.T) {
				host, guest := p.dialGuest(t)
				e := ends{host, guest}
				host.SetDeadline(time.Now().Add(patience))
				guest.SetDeadline(time.Now().Add(patience))
				if _, err := host.Write([]byte("down")); err != nil {
					t.Fatal(err)
				}
				if _, err := guest.Write([]byte("up")); err != nil {
					t.Fatal(err)
				}
				waitFor(t, "bytes of the guest", func() bool { return p.Usage().Buffered == 2 })
				for _, i := range order {
					if err := steps[i].do(e); err != nil {
						t.Errorf("%s: %v", steps[i].name, err)
					}
				}
				// CloseRead drops what was not read.
				if got, err := io.ReadAll(host); len(got) != 0 || err != nil {
					t.Errorf("host reads %q, %v; want its end", got, err)
				}
				if got, err := io.ReadAll(guest); string(got) != "down" && len(got) != 0 || err != nil {
					t.Errorf("guest reads %q, %v; want what the host wrote, or nothing", got, err)
				}
				if hostFirst {
					host.Close()
					guest.Close()
				} else {
					guest.Close()
					host.Close()
				}
				waitFor(t, "end of the connection", func() bool {
					u := p.Usage()
					return u.Conns == 0 && u.Table == 0 && u.Committed == 0
				})
			})
		}
	}
}

// permutations returns all orders of the numbers below n.
func permutations(n int) (all [][]int) {
	if n == 0 {
		return [][]int{nil}
	}
	for _, p := range permutations(n - 1) {
		for i := range n {
			all = append(all, slices.Insert(slices.Clone(p), i, n-1))
		}
	}
	return all
}
