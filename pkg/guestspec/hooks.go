package guestspec

//lint:file-ignore SA1019 Prestart is deprecated, and still used.

import (
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// splitHooks returns the hooks of the host and those of the guest.
func splitHooks(h *specs.Hooks) (host specs.Hooks, guest *specs.Hooks, err error) {
	if h == nil {
		return host, nil, nil
	}
	for _, c := range h.CreateContainer {
		return host, nil, unsupported("createContainer hook %s: a program of the host cannot run inside a virtual machine", c.Path)
	}
	prestart := h.Prestart
	host = specs.Hooks{Prestart: prestart, CreateRuntime: h.CreateRuntime, Poststart: h.Poststart, Poststop: h.Poststop}
	for _, l := range []struct {
		name  string
		hooks []specs.Hook
	}{
		{"prestart", prestart},
		{"createRuntime", host.CreateRuntime},
		{"startContainer", h.StartContainer},
		{"poststart", host.Poststart},
		{"poststop", host.Poststop},
	} {
		if err := checkHooks(l.name, l.hooks); err != nil {
			return specs.Hooks{}, nil, err
		}
	}
	if len(h.StartContainer) > 0 {
		guest = &specs.Hooks{StartContainer: h.StartContainer}
	}
	return host, guest, nil
}

// checkHooks holds hooks to the spec's MUSTs: an absolute path, and a timeout
// above zero when there is one.
func checkHooks(name string, hooks []specs.Hook) error {
	for i, h := range hooks {
		if !filepath.IsAbs(h.Path) {
			return invalid("%s hook #%d: path %q is not absolute", name, i, h.Path)
		}
		if h.Timeout != nil && *h.Timeout <= 0 {
			return invalid("%s hook #%d, %s: timeout of %d s: want more than 0", name, i, h.Path, *h.Timeout)
		}
	}
	return nil
}
