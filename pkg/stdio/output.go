package stdio

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"

	"github.com/vmrt/vmrt/pkg/streaming"
)

// output is where one of stdout and stderr goes.
type output interface {
	Write(p []byte) (int, error)
	// finish is called once, after the last Write. It may wait.
	finish()
	// abort ends a Write or a finish that waits. It may be called at any
	// time and more than once.
	abort()
}

// openOutputs sets stdout, stderr and logger. The scheme of Stdout decides for
// both streams, as it does in containerd's runc shim; paths and streams may go
// together.
func (s *IO) openOutputs(ctx context.Context, cfg Config) error {
	if cfg.null() && !cfg.Terminal {
		return nil
	}
	u, err := url.Parse(cfg.Stdout)
	if err != nil {
		return fmt.Errorf("parse stdout URI: %w", err)
	}
	if streaming.IsURI(cfg.Stdout) {
		return s.openPaths(ctx, cfg)
	}
	switch u.Scheme {
	case "", "fifo":
		err = s.openPaths(ctx, cfg)
	case "file":
		err = s.openLogFile(u.Path, cfg)
	case "binary", "binary-v2":
		err = s.openLogger(ctx, u, cfg)
	default:
		err = fmt.Errorf("unknown STDIO scheme %s", u.Scheme)
	}
	return err
}

func (s *IO) openPaths(ctx context.Context, cfg Config) error {
	open := func(name, path string) (output, error) {
		if path == "" {
			return discard{}, nil
		}
		var o output
		var err error
		if streaming.IsURI(path) {
			o, err = s.openStream(name, path, cfg)
		} else {
			o, err = openOutput(ctx, path)
		}
		if err != nil {
			return nil, s.errorf("open "+name+" "+path, err)
		}
		return o, nil
	}
	var err error
	if s.stdout, err = open("stdout", cfg.Stdout); err != nil || cfg.Terminal {
		return err
	}
	s.stderr, err = open("stderr", cfg.Stderr)
	return err
}

// openLogFile appends both streams to one file. Each write is one append, so
// two open files serve as well as one.
func (s *IO) openLogFile(path string, cfg Config) error {
	open := func() (output, error) {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, s.errorf("make folder of log file "+path, cause(err))
		}
		f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, s.errorf("open log file "+path, cause(err))
		}
		return files{f}, nil
	}
	var err error
	if s.stdout, err = open(); err != nil || cfg.Terminal {
		return err
	}
	if cfg.Stderr == "" {
		s.stderr = discard{}
		return nil
	}
	s.stderr, err = open()
	return err
}

func (s *IO) openLogger(ctx context.Context, u *url.URL, cfg Config) error {
	streams := 2
	if cfg.Terminal {
		streams = 1
	}
	l, err := startLogger(ctx, u, cfg, streams, s.log, s.timing.logger)
	if err != nil {
		return err
	}
	s.logger = l
	s.stdout = loggerOutput{l, l.stdout}
	if !cfg.Terminal {
		s.stderr = loggerOutput{l, l.stderr}
	}
	return nil
}

// discard is an output that has no name.
type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) finish()                     {}
func (discard) abort()                      {}

// files is an output whose first element is written to; the others are only
// held open until the end.
type files []*os.File

func (f files) Write(p []byte) (int, error) { return f[0].Write(p) }
func (f files) finish()                     { f.abort() }
func (f files) abort() {
	for _, file := range f {
		file.Close()
	}
}

// cause strips the operation and path that package os adds to an error, for
// messages that name them already.
func cause(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}
