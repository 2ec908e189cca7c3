//go:build linux

package daemon

import (
	"errors"
	"io"
	"strings"
	"sync"
)

// tailSize bounds what is kept of a daemon's output, in bytes.
const tailSize = 2048

// tail keeps the end of what it reads.
type tail struct {
	mu sync.Mutex
	b  []byte
}

// ReadFrom reads r to its end.
func (t *tail) ReadFrom(r io.Reader) (int64, error) {
	var total int64
	buf := make([]byte, 1024)
	for {
		n, err := r.Read(buf)
		total += int64(n)
		t.mu.Lock()
		t.b = append(t.b, buf[:n]...)
		if over := len(t.b) - tailSize; over > 0 {
			t.b = append(t.b[:0], t.b[over:]...)
		}
		t.mu.Unlock()
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// String returns what was kept, as the end of an error's text: empty, or after
// a colon.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := strings.TrimSpace(strings.ToValidUTF8(string(t.b), "?"))
	if s == "" {
		return ""
	}
	return ": " + strings.ReplaceAll(s, "\n", "; ")
}
