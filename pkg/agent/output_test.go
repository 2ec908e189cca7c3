package agent_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"testing"
	"testing/iotest"
)

// testPieces has a container write pieces that fit neither a page nor a packet,
// to a host that reads now much, now little: credit ends in the middle of a page,
// and what a pipe holds leaves with the pages that it is in.
func testPieces(t *testing.T, c *client) {
	ctr := c.running(t)
	for _, tt := range []struct {
		piece, read, size int
	}{
		{piece: 100, read: 64 << 10, size: 256 << 10},
		{piece: 4095, read: 1000, size: 1 << 20},
		{piece: 4097, read: 64 << 10, size: 4 << 20},
		{piece: 70001, read: 777, size: 2 << 20},
		{piece: 70001, read: 1 << 20, size: 8 << 20},
	} {
		t.Run(fmt.Sprintf("%d/%d", tt.piece, tt.read), func(t *testing.T) {
			inURL, in := c.stream(t)
			outURL, out := c.stream(t)
			id := ctr.exec(streams{in: inURL, out: outURL}, []string{"dd", fmt.Sprintf("bs=%d", tt.piece)})
			ctr.start(id)
			data := noise(tt.size)
			go func() {
				in.Write(data)
				in.CloseWrite()
			}()
			var got bytes.Buffer
			_, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{out}, make([]byte, tt.read))
			if !bytes.Equal(got.Bytes(), data) || err != nil {
				t.Errorf("output = %d bytes, %v; want the %d sent", got.Len(), err, tt.size)
			}
			if status := ctr.wait(id); status != 0 {
				t.Errorf("status = %d; want 0", status)
			}
			ctr.delete(id)
		})
	}
}

// testFileToOutput has a program hand pages of a file to its stdout, as cat does
// with sendfile(2).
func testFileToOutput(t *testing.T, c *client) {
	ctr := c.running(t)
	const file = "/bin/busybox"
	want, _ := ctr.output(file, "sha256sum", file)
	for name, half := range map[string]bool{"read whole": false, "read in halves": true} {
		t.Run(name, func(t *testing.T) {
			url, out := c.stream(t)
			id := ctr.exec(streams{out: url}, []string{"cat", file})
			ctr.start(id)
			var r io.Reader = out
			if half {
				r = iotest.HalfReader(out)
			}
			sum := sha256.New()
			n, err := io.Copy(sum, r)
			if got := fmt.Sprintf("%x  %s\n", sum.Sum(nil), file); got != want || err != nil {
				t.Errorf("output = %d bytes, %v, with the sum %q; want %q", n, err, got, want)
			}
			if status := ctr.wait(id); status != 0 {
				t.Errorf("status = %d; want 0", status)
			}
			ctr.delete(id)
		})
	}
}

// testPipes has programs hand a file on through pipes of their own, in pieces that
// fill many slots of one at once and others that end within a page. A pipe takes
// what pipe(7) says and no more, however large the pieces are.
func testPipes(t *testing.T, c *client) {
	ctr := c.running(t)
	const file = "/bin/busybox"
	want, _ := ctr.output("sh", "-c", file+" sha256sum <"+file)
	for _, size := range []string{"32k 32k", "1M 5000", "100001 3001", "36863 64k", "131072 4095", "64k 1M"} {
		var write, read string
		fmt.Sscan(size, &write, &read)
		got, status := ctr.output("sh", "-c", fmt.Sprintf("dd if=%s bs=%s 2>/dev/null | dd bs=%s 2>/dev/null | %s sha256sum", file, write, read, file))
		if got != want || status != 0 {
			t.Errorf("sum of what dd bs=%s wrote and dd bs=%s read = %q, status %d; want %q", write, read, got, status, want)
		}
	}
	// The writer ends while it waits for room: it sleeps for nothing else.
	for _, size := range []string{"4k", "32k", "1M"} {
		got, status := ctr.output("sh", "-c", fmt.Sprintf(
			"mkfifo /tmp/full; dd if=/dev/zero of=/tmp/full bs=%s & exec 3</tmp/full; until grep -q ' S ' /proc/$!/stat; do :; done; kill -9 $!; wait $!; wc -c <&3; rm /tmp/full", size))
		var n int
		if _, err := fmt.Sscan(got, &n); err != nil || n != 64<<10 || status != 0 {
			t.Errorf("a pipe took %q in pieces of %s, status %d; want 65536", got, size, status)
		}
	}
}
