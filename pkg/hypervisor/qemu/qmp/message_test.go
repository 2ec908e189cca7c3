package qmp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"testing"
)

// FuzzDecode: whatever QEMU sends, decode neither panics nor lets a message
// through that is of no kind or of two, or is larger than the limits say.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		`{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}`,
		`{"return": {}, "id": 1}`,
		`{"return": [1, {"a": null}], "id": 18446744073709551615}`,
		`{"id": 1, "error": {"class": "GenericError", "desc": "x"}}`,
		`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`,
		`{"timestamp": {"seconds": 1, "microseconds": 999999}, "event": "STOP", "data": {"a": 1}}`,
		`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "STOP"}`,
		`{"return": null, "ID": 7, "Event": null}`,
		`{}`, `null`, `[]`, `"`, "{\"return\":\xff}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, line []byte) {
		copied := bytes.Clone(line)
		m, err := decode(line)
		if err != nil {
			return
		}
		kinds := 0
		if m.greeting != nil {
			kinds++
			if len(m.greeting.Package) > maxText+len("…") {
				t.Errorf("package name of %d bytes", len(m.greeting.Package))
			}
		}
		if m.event != nil {
			kinds++
			if len(m.event.Data) > maxEvent || len(m.event.Name) > maxText {
				t.Errorf("event %q with %d bytes", m.event.Name, len(m.event.Data))
			}
		}
		if m.fault != nil {
			kinds++
			if len(m.fault.Error()) > 2*maxText+16 {
				t.Errorf("error text of %d bytes", len(m.fault.Error()))
			}
		}
		if m.result != nil {
			kinds++
			if m.id == nil || !json.Valid(m.result) {
				t.Errorf("result %q with id %v", m.result, m.id)
			}
		}
		if kinds != 1 {
			t.Errorf("decode(%q) = %+v; want one kind", line, m)
		}
		// The caller reuses the line's memory.
		result := bytes.Clone(m.result)
		clear(line)
		if !bytes.Equal(m.result, result) {
			t.Errorf("decode(%q) refers to its input", copied)
		}
	})
}

func TestMaxLineFitsScanner(t *testing.T) {
	// bufio.Scanner grows by doubling: a limit that is no power of two times
	// its first buffer would still be respected, but say so.
	s := bufio.NewScanner(bytes.NewReader(append(bytes.Repeat([]byte("x"), maxLine-2), '\n')))
	s.Buffer(make([]byte, 4<<10), maxLine)
	if !s.Scan() || len(s.Bytes()) != maxLine-2 {
		t.Errorf("a line of %d bytes is refused: %v", maxLine-2, s.Err())
	}
}
