package stdio

import (
	"bytes"
	"io"
	"testing"

	"github.com/containerd/containerd/v2/pkg/cio"
)

// containerd's own client: its IO ends by itself once the streams have ended,
// which is what clients wait for before they delete a task.
func TestContainerdClient(t *testing.T) {
	for _, terminal := range []bool{false, true} {
		checkLeaks(t)
		ctx, _ := testContext(t)
		data := randomBytes(3 << 20)
		var stdout, stderr bytes.Buffer
		opts := []cio.Opt{
			cio.WithStreams(bytes.NewReader(data), &stdout, &stderr), cio.WithFIFODir(t.TempDir()),
		}
		if terminal {
			opts = append(opts, cio.WithTerminal)
		}
		client, err := cio.NewCreator(opts...)("web")
		if err != nil {
			t.Fatal(err)
		}
		names := client.Config()
		s := new(streams)
		s.io, err = Open(ctx, Config{
			Namespace: "ns", ID: "web",
			Stdin: names.Stdin, Stdout: names.Stdout, Stderr: names.Stderr, Terminal: names.Terminal,
		})
		if err != nil {
			t.Fatalf("Open() = %v", err)
		}
		s.attach(t, nil)
		go func() {
			// The process takes all its input and ends.
			io.CopyN(s.guestOut, s.guestIn, int64(len(data)))
			s.guestOut.CloseWrite()
			if s.guestErr != nil {
				s.guestErr.Write([]byte("done"))
				s.guestErr.CloseWrite()
			}
		}()
		await(t, "end of the client's streams", start(client.Wait))
		sameBytes(t, "stdout", stdout.Bytes(), data)
		if got, want := stderr.String(), map[bool]string{false: "done", true: ""}[terminal]; got != want {
			t.Errorf("stderr: got %q; want %q", got, want)
		}
		if err := s.io.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
		client.Cancel()
		client.Close()
	}
}
