package api_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/vmrt/vmrt/api"
)

func TestDialRequest(t *testing.T) {
	for _, tc := range []struct {
		to   string
		want string // on the wire
	}{
		{"127.0.0.1:80", "\x04\x7f\x00\x00\x01\x00\x50"},
		{"[::1]:65535", "\x06" + strings.Repeat("\x00", 15) + "\x01\xff\xff"},
		{"192.0.2.1:0", ""},
		{"0.0.0.0:80", ""},
		{"[::]:80", ""},
		{"[::ffff:192.0.2.1]:80", ""},
		{"[fe80::1%eth0]:80", ""},
	} {
		to := netip.MustParseAddrPort(tc.to)
		var b bytes.Buffer
		err := api.WriteDialRequest(&b, to)
		if b.String() != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("WriteDialRequest(%s) = %v, wrote %q; want %q", to, err, b.String(), tc.want)
		}
		if tc.want == "" {
			continue
		}
		if got, err := api.ReadDialRequest(&b); got != to || err != nil {
			t.Errorf("ReadDialRequest(%q) = %s, %v; want %s", tc.want, got, err, to)
		}
	}
	if err := api.WriteDialRequest(new(bytes.Buffer), netip.AddrPort{}); err == nil {
		t.Error("WriteDialRequest of no address = nil; want an error")
	}
	for _, s := range []string{
		"", "\x04", "\x04\x7f\x00\x00\x01\x00", "\x05\x7f\x00\x00\x01\x00\x50", "\x04\x7f\x00\x00\x01\x00\x00",
		"\x04\x00\x00\x00\x00\x00\x50", "\x06" + strings.Repeat("\x00", 16) + "\x00\x50",
		"\x06" + strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01\x00\x50",
	} {
		if to, err := api.ReadDialRequest(strings.NewReader(s)); err == nil {
			t.Errorf("ReadDialRequest(%q) = %s; want an error", s, to)
		}
	}
}

func TestDialAnswer(t *testing.T) {
	for _, tc := range []struct {
		failure error
		want    string // of what ReadDialAnswer says
	}{
		{nil, ""},
		{fmt.Errorf("connect: %w", syscall.ECONNREFUSED), "connection refused"},
		{errors.New("no"), `the other side says "no"`},
		{errors.New("a\nb\x1b[2J\u202e"), `the other side says "a\nb\x1b[2J\u202e"`},
		{errors.New(strings.Repeat("x", 1000)), `the other side says "` + strings.Repeat("x", api.MaxDialError) + `"`},
	} {
		var b bytes.Buffer
		if err := api.WriteDialAnswer(&b, tc.failure); err != nil {
			t.Fatal(err)
		}
		got := ""
		if err := api.ReadDialAnswer(&b); err != nil {
			got = err.Error()
			if want := errors.Is(tc.failure, syscall.ECONNREFUSED); errors.Is(err, syscall.ECONNREFUSED) != want {
				t.Errorf("answer to %v is ECONNREFUSED: %v; want %v", tc.failure, !want, want)
			}
		}
		if got != tc.want || b.Len() != 0 {
			t.Errorf("answer to %v reads %q and leaves %d bytes; want %q", tc.failure, got, b.Len(), tc.want)
		}
	}
	for _, s := range []string{"", "e", "e\x05", "e\x05abc", "x", "\x00"} {
		if err := api.ReadDialAnswer(strings.NewReader(s)); err == nil {
			t.Errorf("ReadDialAnswer(%q) = nil; want an error", s)
		}
	}
}

// FuzzDialRequest: what is accepted is what would be written for it.
func FuzzDialRequest(f *testing.F) {
	for _, s := range []string{"", "\x04\x7f\x00\x00\x01\x00\x50", "\x06" + strings.Repeat("\x01", 18) + "more", "\x09\x00\x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		to, err := api.ReadDialRequest(r)
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := api.WriteDialRequest(&b, to); err != nil || !bytes.Equal(b.Bytes(), in[:len(in)-r.Len()]) {
			t.Errorf("ReadDialRequest(%q) = %s, which is written %q, %v", in, to, b.Bytes(), err)
		}
	})
}

// FuzzDialAnswer: it reads no more than an answer can have, and its text is
// fit for a log.
func FuzzDialAnswer(f *testing.F) {
	for _, s := range []string{"", "k", "r", "e\x03abc", "e\xff", "k\x00data"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		err := api.ReadDialAnswer(r)
		read := len(in) - r.Len()
		if read > 2+api.MaxDialError || err == nil && read != 1 {
			t.Errorf("ReadDialAnswer(%q) = %v after %d bytes", in, err, read)
		}
		if err == nil {
			return
		}
		for _, c := range []byte(err.Error()) {
			if c < ' ' || c > '~' {
				t.Errorf("ReadDialAnswer(%q) = %q; want printable ASCII", in, err)
			}
		}
	})
}
