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
		network string
		to      string
		want    string // on the wire
	}{
		{api.TCP, "127.0.0.1:80", "\x04\x7f\x00\x00\x01\x00\x50"},
		{api.TCP, "[::1]:65535", "\x06" + strings.Repeat("\x00", 15) + "\x01\xff\xff"},
		{api.UDP, "127.0.0.11:53", "\x14\x7f\x00\x00\x0b\x00\x35"},
		{api.UDP, "[::1]:53", "\x16" + strings.Repeat("\x00", 15) + "\x01\x00\x35"},
		{"unix", "127.0.0.1:80", ""},
		{api.TCP, "192.0.2.1:0", ""},
		{api.TCP, "0.0.0.0:80", ""},
		{api.TCP, "[::]:80", ""},
		{api.TCP, "[::ffff:192.0.2.1]:80", ""},
		{api.TCP, "[fe80::1%eth0]:80", ""},
	} {
		to := netip.MustParseAddrPort(tc.to)
		var b bytes.Buffer
		err := api.WriteDialRequest(&b, tc.network, to)
		if b.String() != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("WriteDialRequest(%s, %s) = %v, wrote %q; want %q", tc.network, to, err, b.String(), tc.want)
		}
		if tc.want == "" {
			continue
		}
		if network, got, err := api.ReadDialRequest(&b); network != tc.network || got != to || err != nil {
			t.Errorf("ReadDialRequest(%q) = %s, %s, %v; want %s, %s", tc.want, network, got, err, tc.network, to)
		}
	}
	if err := api.WriteDialRequest(new(bytes.Buffer), api.TCP, netip.AddrPort{}); err == nil {
		t.Error("WriteDialRequest of no address = nil; want an error")
	}
	for _, s := range []string{
		"", "\x04", "\x24\x7f\x00\x00\x01\x00\x50", "\x04\x7f\x00\x00\x01\x00", "\x05\x7f\x00\x00\x01\x00\x50", "\x04\x7f\x00\x00\x01\x00\x00",
		"\x04\x00\x00\x00\x00\x00\x50", "\x06" + strings.Repeat("\x00", 16) + "\x00\x50",
		"\x06" + strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01\x00\x50",
	} {
		if _, to, err := api.ReadDialRequest(strings.NewReader(s)); err == nil {
			t.Errorf("ReadDialRequest(%q) = %s; want an error", s, to)
		}
	}
}

func TestDatagram(t *testing.T) {
	var b bytes.Buffer
	all := [][]byte{[]byte("one"), {}, bytes.Repeat([]byte("x"), api.MaxDatagram)}
	for _, d := range all {
		if err := api.WriteDatagram(&b, d); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range all {
		if got, err := api.ReadDatagram(&b); err != nil || !bytes.Equal(got, want) {
			t.Errorf("ReadDatagram() = %d bytes, %v; want the %d that were written", len(got), err, len(want))
		}
	}
	if err := api.WriteDatagram(&b, make([]byte, api.MaxDatagram+1)); err == nil || b.Len() != 0 {
		t.Errorf("WriteDatagram of too much = %v, and %d bytes written; want an error and none", err, b.Len())
	}
	for _, s := range []string{"", "\x00", "\x00\x02x"} {
		if got, err := api.ReadDatagram(strings.NewReader(s)); err == nil {
			t.Errorf("ReadDatagram(%q) = %q; want an error", s, got)
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
		network, to, err := api.ReadDialRequest(r)
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := api.WriteDialRequest(&b, network, to); err != nil || !bytes.Equal(b.Bytes(), in[:len(in)-r.Len()]) {
			t.Errorf("ReadDialRequest(%q) = %s, %s, which is written %q, %v", in, network, to, b.Bytes(), err)
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
