package api_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/vmrt/vmrt/api"
)

func TestDialRequest(t *testing.T) {
	for _, tc := range []struct {
		network string
		port    uint16
		want    string // on the wire
	}{
		{api.DialTCP4, 80, "\x04\x00\x50"},
		{api.DialTCP6, 65535, "\x06\xff\xff"},
		{api.DialTCP4, 0, ""},
		{"tcp", 80, ""},
		{"udp4", 53, ""},
		{"", 80, ""},
	} {
		var b bytes.Buffer
		err := api.WriteDialRequest(&b, tc.network, tc.port)
		if b.String() != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("WriteDialRequest(%q, %d) = %v, wrote %q; want %q", tc.network, tc.port, err, b.String(), tc.want)
		}
		if tc.want == "" {
			continue
		}
		network, port, err := api.ReadDialRequest(&b)
		if network != tc.network || port != tc.port || err != nil {
			t.Errorf("ReadDialRequest(%q) = %q, %d, %v; want %q, %d", tc.want, network, port, err, tc.network, tc.port)
		}
	}
	for _, s := range []string{"", "\x04", "\x04\x00", "\x05\x00\x50", "\x04\x00\x00"} {
		if network, port, err := api.ReadDialRequest(strings.NewReader(s)); err == nil {
			t.Errorf("ReadDialRequest(%q) = %q, %d; want an error", s, network, port)
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
		{errors.New("no"), `the guest says "no"`},
		{errors.New("a\nb\x1b[2J\u202e"), `the guest says "a\nb\x1b[2J\u202e"`},
		{errors.New(strings.Repeat("x", 1000)), `the guest says "` + strings.Repeat("x", api.MaxDialError) + `"`},
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
	for _, s := range []string{"", "\x04\x00\x50", "\x06\xff\xffmore", "\x09\x00\x00"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		network, port, err := api.ReadDialRequest(r)
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := api.WriteDialRequest(&b, network, port); err != nil || !bytes.Equal(b.Bytes(), in[:len(in)-r.Len()]) {
			t.Errorf("ReadDialRequest(%q) = %q, %d, which is written %q, %v", in, network, port, b.Bytes(), err)
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
