package agent

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
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
