package stdio

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/vmrt/vmrt/pkg/streaming"
)

// input is where stdin comes from. Everything but copyTo never waits and may be
// called at any time and more than once.
type input interface {
	// copyTo sends what clients write until the input has ended, which is no
	// error.
	copyTo(conn Conn, idle time.Duration) error
	// release lets the input end with the last client.
	release() error
	// finish says that the process reads no more.
	finish()
	// close ends copyTo and what clients have open.
	close()
}

func openStdin(cfg Config) (input, error) {
	if !streaming.IsURI(cfg.Stdin) {
		in, err := newFileInput(cfg.Stdin, cfg.StdinAfter)
		if err != nil {
			return nil, err
		}
		return in, nil
	}
	id, err := streamID(cfg, cfg.Stdin)
	if err != nil {
		return nil, err
	}
	in, err := cfg.Streaming.Input(id)
	if err != nil {
		return nil, err
	}
	return streamInput{in}, nil
}

func streamID(cfg Config, uri string) (string, error) {
	if cfg.Streaming == nil {
		return "", fmt.Errorf("streams are not served: %w", errdefs.ErrNotImplemented)
	}
	return cfg.Streaming.ID(uri)
}

type streamInput struct{ *streaming.Input }

func (in streamInput) copyTo(conn Conn, _ time.Duration) error {
	_, err := in.WriteTo(conn)
	return err
}

func (in streamInput) release() error {
	in.CloseWrite()
	return nil
}

func (in streamInput) finish() { in.Discard() }
func (in streamInput) close()  { in.Close() }

// streamOutput is an output whose client may come and go.
type streamOutput struct {
	*streaming.Output
	name string
	// late tells of a client that does not come.
	late *time.Timer
}

func (s *IO) openStream(name, uri string, cfg Config) (output, error) {
	id, err := streamID(cfg, uri)
	if err != nil {
		return nil, err
	}
	o, err := cfg.Streaming.Output(id)
	if err != nil {
		return nil, err
	}
	late := time.AfterFunc(s.timing.open, func() {
		if !o.Visited() {
			s.log.Warnf("no client has opened stream %s for %v: %s waits for one", id, s.timing.open, name)
		}
	})
	return streamOutput{o, name, late}, nil
}

func (o streamOutput) finish() { o.Finish() }

func (o streamOutput) abort() {
	o.late.Stop()
	o.Close()
}

// undelivered returns the outputs that go to streams and have more to deliver,
// with their pumps.
func (s *IO) undelivered() (outputs []streamOutput, pumps []<-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, o := range []output{s.stdout, s.stderr} {
		if o == nil || n == len(s.draining) {
			continue
		}
		pump := s.draining[n]
		n++
		st, ok := o.(streamOutput)
		if !ok {
			continue
		}
		select {
		case <-pump:
		default:
			outputs, pumps = append(outputs, st), append(pumps, pump)
		}
	}
	return outputs, pumps
}

// absent says which streams wait for a client.
func (s *IO) absent() (errs []error) {
	outputs, _ := s.undelivered()
	for _, o := range outputs {
		switch {
		case !o.Visited():
			errs = append(errs, fmt.Errorf("%s: no client has opened stream %s: %w", o.name, o.ID(), errdefs.ErrNotFound))
		case !o.Connected():
			errs = append(errs, fmt.Errorf("%s: no client has stream %s open: %w", o.name, o.ID(), errdefs.ErrUnavailable))
		}
	}
	return errs
}

// Settle waits for output that is on its way to the clients of streams. CRI
// ends its streams when it hears of a container's exit, whatever they still
// hold: so that no byte is lost, Settle must have returned before.
//
// It returns when all was read, when no client is there, after a second in
// which nothing has moved, and with ctx. It does nothing for other outputs.
func (s *IO) Settle(ctx context.Context) {
	for {
		outputs, pumps := s.undelivered()
		var waiting []<-chan struct{}
		var before, after uint64
		for i, o := range outputs {
			before += o.Moved()
			if o.Connected() {
				waiting = append(waiting, pumps[i])
			}
		}
		if len(waiting) == 0 {
			return
		}
		quiet, cancel := context.WithTimeout(ctx, s.timing.quiet)
		done := wait(quiet, waiting)
		cancel()
		for _, o := range outputs {
			after += o.Moved()
		}
		if done || after == before || ctx.Err() != nil {
			return
		}
	}
}
