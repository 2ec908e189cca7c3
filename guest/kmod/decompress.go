package kmod

import (
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxModule bounds a module's size, unpacked.
const maxModule = 64 << 20

// readModule returns the content of a module file, unpacked as its name asks.
func readModule(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := unpacker(f, filepath.Ext(file))
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", file, err)
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", file, err)
	}
	if len(data) > maxModule {
		return nil, fmt.Errorf("unpack %s: more than %d bytes", file, maxModule)
	}
	return data, nil
}

func unpacker(r io.Reader, ext string) (io.Reader, error) {
	switch ext {
	case ".ko":
		return r, nil
	case ".xz":
		return xz.NewReader(r)
	case ".zst":
		return zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
	case ".gz":
		return gzip.NewReader(r)
	}
	return nil, fmt.Errorf("unknown compression %q", ext)
}
