package agent

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/vmrt/vmrt/api"
)

func TestEncodeHello(t *testing.T) {
	now := time.Unix(1700000000, 123456789)
	r := bytes.NewReader(encodeHello("1.2.3", "6.12.0-vmrt", now))
	var got api.Hello
	if err := api.ReadMessage(r, &got); err != nil {
		t.Fatal(err)
	}
	want := &api.Hello{
		Protocol: api.ProtocolVersion, Version: "1.2.3", Kernel: "6.12.0-vmrt",
		Time: timestamppb.New(now),
	}
	if diff := cmp.Diff(want, &got, protocmp.Transform()); diff != "" || r.Len() > 0 {
		t.Errorf("encodeHello() (-want +got), %d bytes left:\n%s", r.Len(), diff)
	}
}

func TestDecodeWelcome(t *testing.T) {
	now := time.Unix(1700000000, 123456789)
	for name, tt := range map[string]struct {
		send *api.Welcome
		want welcome
	}{
		"empty":   {&api.Welcome{}, welcome{}},
		"refused": {&api.Welcome{Refused: "too old"}, welcome{refused: "too old"}},
		"all": {
			&api.Welcome{Time: timestamppb.New(now), Seed: []byte{0, 1, 2}, Hostname: "pod"},
			welcome{time: now, seed: []byte{0, 1, 2}, hostname: "pod"},
		},
		"before 1970": {&api.Welcome{Time: timestamppb.New(time.Unix(-5, 7))}, welcome{time: time.Unix(-5, 7)}},
	} {
		t.Run(name, func(t *testing.T) {
			// A later host may say more than this agent knows of.
			var unknown []byte
			unknown = protowire.AppendTag(unknown, 90, protowire.Fixed64Type)
			unknown = protowire.AppendFixed64(unknown, 1)
			unknown = protowire.AppendTag(unknown, 91, protowire.BytesType)
			unknown = protowire.AppendString(unknown, "new")
			tt.send.ProtoReflect().SetUnknown(unknown)
			var b bytes.Buffer
			if err := api.WriteMessage(&b, tt.send); err != nil {
				t.Fatal(err)
			}
			got, err := decodeWelcome(&b)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tt.want, got, cmp.AllowUnexported(welcome{})); diff != "" || b.Len() > 0 {
				t.Errorf("decodeWelcome() (-want +got), %d bytes left:\n%s", b.Len(), diff)
			}
		})
	}
}

func TestDecodeWelcomeMalformed(t *testing.T) {
	for name, b := range map[string]string{
		"no length": "\x00\x00", "short": "\x00\x00\x00\x05\x0a\x01a", "too long": "\xff\xff\xff\xff",
		"no tag": "\x00\x00\x00\x01\xff", "bytes beyond the end": "\x00\x00\x00\x03\x0a\x7fa",
		"endless number": "\x00\x00\x00\x02\x28\xff", "nanoseconds": "\x00\x00\x00\x08\x12\x06\x10\xff\xff\xff\xff\x0f",
	} {
		if w, err := decodeWelcome(strings.NewReader(b)); err == nil {
			t.Errorf("%s: decodeWelcome() = %+v; want an error", name, w)
		}
	}
}
