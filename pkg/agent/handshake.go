package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/vmrt/vmrt/api"
	"github.com/vmrt/vmrt/pkg/agent/clock"
	"github.com/vmrt/vmrt/pkg/agent/entropy"
)

// handshakeTimeout bounds the wait for the host's answer.
const handshakeTimeout = 30 * time.Second

// sayHello tells the host that the guest is ready.
func sayHello(host int, version string) error {
	kernel, err := release()
	if err != nil {
		return fmt.Errorf("say hello: %w", err)
	}
	b := encodeHello(version, kernel, time.Now())
	for len(b) > 0 {
		n, err := unix.Write(host, b)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("say hello: %w", err)
		}
		b = b[max(n, 0):]
	}
	return nil
}

// encodeHello returns what api.WriteMessage sends for an api.Hello. It is
// written out because setting up the protobuf package takes longer than the
// rest of the handshake.
func encodeHello(version, kernel string, now time.Time) []byte {
	var stamp []byte // google.protobuf.Timestamp
	stamp = protowire.AppendTag(stamp, 1, protowire.VarintType)
	stamp = protowire.AppendVarint(stamp, uint64(now.Unix()))
	stamp = protowire.AppendTag(stamp, 2, protowire.VarintType)
	stamp = protowire.AppendVarint(stamp, uint64(now.Nanosecond()))

	b := make([]byte, 4, 256)
	b = protowire.AppendTag(b, 1, protowire.VarintType)
	b = protowire.AppendVarint(b, api.ProtocolVersion)
	b = protowire.AppendTag(b, 2, protowire.BytesType)
	b = protowire.AppendString(b, version)
	b = protowire.AppendTag(b, 3, protowire.BytesType)
	b = protowire.AppendString(b, kernel)
	b = protowire.AppendTag(b, 4, protowire.BytesType)
	b = protowire.AppendBytes(b, stamp)
	binary.BigEndian.PutUint32(b, uint32(len(b)-4))
	return b
}

// release returns `uname -r`.
func release() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	name, _, _ := bytes.Cut(u.Release[:], []byte{0})
	return string(name), nil
}

// readWelcome does what the host's answer says.
func readWelcome(host *os.File) error {
	if err := host.SetReadDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return fmt.Errorf("welcome: %w", err)
	}
	w, err := decodeWelcome(host)
	if err != nil {
		return fmt.Errorf("welcome: %w", err)
	}
	if err := host.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("welcome: %w", err)
	}
	if w.refused != "" {
		return fmt.Errorf("the host refuses this guest: %s", w.refused)
	}
	return applyWelcome(w)
}

// welcome is an api.Welcome.
type welcome struct {
	refused, hostname string
	time              time.Time // zero if there is none
	seed              []byte
}

// decodeWelcome reads what api.WriteMessage sends for an api.Welcome. Like
// encodeHello it does without the protobuf package.
func decodeWelcome(r io.Reader) (*welcome, error) {
	b, err := api.ReadFrame(r)
	if err != nil {
		return nil, err
	}
	w := &welcome{}
	err = eachField(b, func(n protowire.Number, value []byte, _ uint64) error {
		switch n {
		case 1:
			w.refused = string(value)
		case 2:
			var sec, nsec uint64 // google.protobuf.Timestamp
			err := eachField(value, func(n protowire.Number, _ []byte, v uint64) error {
				switch n {
				case 1:
					sec = v
				case 2:
					nsec = v
				}
				return nil
			})
			if nsec >= uint64(time.Second) {
				return fmt.Errorf("time with %d nanoseconds", nsec)
			}
			w.time = time.Unix(int64(sec), int64(nsec))
			return err
		case 3:
			w.seed = value
		case 4:
			w.hostname = string(value)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("decode message of %d bytes: %w", len(b), err)
	}
	return w, nil
}

// eachField calls f for the fields of a message that are bytes or varints, with
// one or the other.
func eachField(b []byte, f func(n protowire.Number, value []byte, varint uint64) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var value []byte
		var varint uint64
		switch kind {
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			varint, n = protowire.ConsumeVarint(b)
		default:
			if n = protowire.ConsumeFieldValue(number, kind, b); n >= 0 {
				b = b[n:]
				continue
			}
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := f(number, value, varint); err != nil {
			return err
		}
	}
	return nil
}

func applyWelcome(w *welcome) error {
	var errs []error
	if !w.time.IsZero() {
		errs = append(errs, clock.Set(w.time))
	}
	if len(w.seed) > 0 {
		errs = append(errs, entropy.Add(w.seed))
	}
	if w.hostname != "" {
		if err := unix.Sethostname([]byte(w.hostname)); err != nil {
			errs = append(errs, fmt.Errorf("set host name %q: %w", w.hostname, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("welcome: %w", err)
	}
	return nil
}

// hostGone delivers the end of the connection that the handshake was on.
func hostGone(host *os.File) <-chan error {
	gone := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, host)
		if err == nil {
			err = io.EOF
		}
		gone <- err
	}()
	return gone
}

// followHostClock keeps the clock right where the machine shows the host's.
// Elsewhere the host corrects it by the Clock call.
func followHostClock() {
	c, err := clock.OpenHostClock()
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		log.L.WithError(err).Warn("open the host's clock")
		return
	}
	go func() {
		defer c.Close()
		err := clock.Follow(context.Background(), c)
		log.L.WithError(err).Warn("the host's clock is not followed any more")
	}()
}
