package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

const (
	// maxLine bounds a message, in bytes. The longest one that QEMU sends,
	// the answer to query-qmp-schema, is about a quarter of it.
	maxLine = 1 << 20
	// maxEvent bounds an event's data, in bytes: events are queued.
	maxEvent = 32 << 10
	// maxText bounds text of QEMU's that ends up in an error.
	maxText = 1 << 10
)

// Error is QEMU's answer to a command that it did not carry out.
type Error struct {
	// Class is "GenericError" unless QEMU means one to be told from others:
	// "DeviceNotFound", "CommandNotFound" and few more.
	Class string `json:"class"`
	// Desc is for people and differs between releases.
	Desc string `json:"desc"`
}

func (e *Error) Error() string {
	if e.Class == "GenericError" {
		return e.Desc
	}
	return e.Class + ": " + e.Desc
}

// Event is something that happened in QEMU.
type Event struct {
	// Name is in upper case: "DEVICE_DELETED".
	Name string
	// Data is a JSON object, or nil. It is the receiver's to decode and not
	// to change.
	Data json.RawMessage
	// Time is QEMU's clock when it happened; zero if QEMU could not read it.
	Time time.Time
}

// Version is the version that QEMU greets with.
type Version struct {
	Major, Minor, Micro int
	// Package is the distribution's own name of the build, if any.
	Package string
}

// message is a line that QEMU sent: a greeting, an answer, or an event.
type message struct {
	greeting *Version

	// id is nil when QEMU could not make out the request's.
	id     *uint64
	result json.RawMessage
	fault  *Error

	event *Event
}

// wireMessage is the union of all messages (QEMU's docs/interop/qmp-spec).
type wireMessage struct {
	QMP *struct {
		Version struct {
			QEMU struct {
				Major int `json:"major"`
				Minor int `json:"minor"`
				Micro int `json:"micro"`
			} `json:"qemu"`
			Package string `json:"package"`
		} `json:"version"`
	} `json:"QMP"`
	ID        *uint64         `json:"id"`
	Return    json.RawMessage `json:"return"`
	Error     *Error          `json:"error"`
	Event     *string         `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// decode reads one line. The message holds no reference to it.
func decode(line []byte) (message, error) {
	var w wireMessage
	if err := json.Unmarshal(line, &w); err != nil {
		return message{}, fmt.Errorf("malformed message %.40q: %w", line, err)
	}
	kinds := 0
	for _, present := range []bool{w.QMP != nil, w.Return != nil, w.Error != nil, w.Event != nil} {
		if present {
			kinds++
		}
	}
	if kinds != 1 {
		return message{}, fmt.Errorf("message %.40q is not one of greeting, answer and event", line)
	}
	switch {
	case w.QMP != nil:
		v := w.QMP.Version
		return message{greeting: &Version{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, truncate(v.Package)}}, nil
	case w.Event != nil:
		return w.decodeEvent()
	case w.Error != nil:
		w.Error.Class, w.Error.Desc = truncate(w.Error.Class), truncate(w.Error.Desc)
		return message{id: w.ID, fault: w.Error}, nil
	case w.ID == nil:
		return message{}, errors.New("answer without an id")
	}
	return message{id: w.ID, result: w.Return}, nil
}

func (w *wireMessage) decodeEvent() (message, error) {
	if len(*w.Event) > maxText || len(w.Data) > maxEvent {
		return message{}, fmt.Errorf("event %.40q with %d bytes of data: at most %d", *w.Event, len(w.Data), maxEvent)
	}
	ev := &Event{Name: *w.Event}
	if !bytes.Equal(w.Data, []byte("null")) {
		ev.Data = w.Data
	}
	// QEMU sends -1 for a time that it does not know.
	if w.Timestamp.Seconds > 0 && w.Timestamp.Microseconds >= 0 {
		ev.Time = time.Unix(w.Timestamp.Seconds, w.Timestamp.Microseconds%1e6*1e3)
	}
	return message{event: ev}, nil
}

func truncate(s string) string {
	if len(s) > maxText {
		return strings.ToValidUTF8(s[:maxText], "") + "…"
	}
	return s
}
