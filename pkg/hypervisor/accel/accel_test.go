package accel

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// device is a character device that is not KVM and always there.
const device = "/dev/null"

func TestChoose(t *testing.T) {
	fast, emulated := verdict{Measured: true, NanosPerInstruction: 0.4}, verdict{Measured: true, NanosPerInstruction: 1500}
	failed := verdict{err: errors.New("/dev/kvm: KVM_CREATE_VM: device or resource busy")}
	tests := map[string]struct {
		wish    hypervisor.Accelerator
		verdict verdict
		want    hypervisor.Accelerator // "" is an error
		text    string
		probes  int
	}{
		"auto, native":   {hypervisor.Auto, fast, hypervisor.KVM, "KVM runs a guest at 0.4 ns an instruction", 1},
		"auto, emulated": {hypervisor.Auto, emulated, hypervisor.TCG, "KVM is not usable: /dev/null takes 1500 ns an instruction of a guest: the kernel emulates it", 1},
		"auto, failed":   {hypervisor.Auto, failed, hypervisor.TCG, "KVM is not usable: /dev/kvm: KVM_CREATE_VM: device or resource busy", 2},
		"kvm, native":    {hypervisor.KVM, fast, hypervisor.KVM, "KVM runs a guest at 0.4 ns an instruction", 1},
		"kvm, emulated":  {hypervisor.KVM, emulated, "", `accelerator "kvm" (try "auto"): /dev/null takes 1500 ns an instruction of a guest: the kernel emulates it`, 1},
		"kvm, failed":    {hypervisor.KVM, failed, "", `accelerator "kvm" (try "auto"): /dev/kvm: KVM_CREATE_VM: device or resource busy`, 2},
		"tcg":            {hypervisor.TCG, fast, hypervisor.TCG, "TCG was asked for", 0},
		"nothing":        {"", fast, "", `accelerator "": want "auto", "kvm" or "tcg"`, 0},
		"something else": {"xen", fast, "", `accelerator "xen": want "auto", "kvm" or "tcg"`, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Device: device, CacheDir: t.TempDir()}
			probes := 0
			for i := range 2 {
				r, err := choose(context.Background(), tt.wish, cfg, func(context.Context, string, time.Duration) verdict { probes++; return tt.verdict })
				if errors.Is(err, errors.ErrUnsupported) {
					t.Skip(err)
				}
				text := r.Reason
				if err != nil {
					text = err.Error()
				}
				if r.Accelerator != tt.want || text != tt.text {
					t.Errorf("Choose(%q) = %q, %q; want %q, %q", tt.wish, r.Accelerator, text, tt.want, tt.text)
				}
				if cached := i == 1 && tt.probes == 1; err == nil && (r.FromCache != cached || r.NanosPerInstruction != tt.verdict.NanosPerInstruction && tt.probes > 0) {
					t.Errorf("Choose(%q), time %d = %+v; want FromCache %v", tt.wish, i+1, r, cached)
				}
			}
			if probes != tt.probes {
				t.Errorf("%d probes in two calls; want %d", probes, tt.probes)
			}
		})
	}
}

func TestChooseProbesAgain(t *testing.T) {
	native := func(probes *int) prober {
		return func(context.Context, string, time.Duration) verdict {
			*probes++
			return verdict{Measured: true, NanosPerInstruction: 1}
		}
	}
	tests := map[string]func(t *testing.T, cfg *Config){
		"another device": func(_ *testing.T, cfg *Config) { cfg.Device = "/dev/zero" },
		"corrupted cache": func(t *testing.T, cfg *Config) {
			if err := os.WriteFile(filepath.Join(cfg.CacheDir, "accel.json"), []byte(`{"value": tru`), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cache of a failure": func(t *testing.T, cfg *Config) {
			path := filepath.Join(cfg.CacheDir, "accel.json")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(strings.Replace(string(b), `"measured":true`, `"measured":false`, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"no speed in the cache": func(t *testing.T, cfg *Config) {
			path := filepath.Join(cfg.CacheDir, "accel.json")
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(strings.Replace(string(b), `"nanos_per_instruction":1`, `"nanos_per_instruction":0`, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"cache anybody can write": func(t *testing.T, cfg *Config) {
			if err := os.Chmod(filepath.Join(cfg.CacheDir, "accel.json"), 0o666); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Device: device, CacheDir: t.TempDir()}
			probes := 0
			for i := range 2 {
				if i == 1 {
					change(t, &cfg)
				}
				r, err := choose(context.Background(), hypervisor.Auto, cfg, native(&probes))
				if err != nil || r.Accelerator == hypervisor.TCG && strings.Contains(r.Reason, "unsupported") {
					t.Skipf("Choose() = %+v, %v", r, err)
				}
			}
			if probes != 2 {
				t.Errorf("%d probes; want 2", probes)
			}
		})
	}
}

func TestChooseWithoutDevice(t *testing.T) {
	cfg := Config{Device: filepath.Join(t.TempDir(), "kvm"), CacheDir: t.TempDir()}
	r, err := Choose(context.Background(), hypervisor.Auto, cfg)
	if err != nil || r.Accelerator != hypervisor.TCG || !strings.Contains(r.Reason, cfg.Device) {
		t.Errorf("Choose(auto) = %+v, %v; want TCG and the device in the reason", r, err)
	}
	if _, err := Choose(context.Background(), hypervisor.KVM, cfg); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Choose(kvm) = %v; want os.ErrNotExist", err)
	}
}

func TestChooseRegularFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Choose(context.Background(), hypervisor.Auto, Config{Device: path, CacheDir: t.TempDir()})
	if err != nil || r.Accelerator != hypervisor.TCG {
		t.Errorf("Choose(auto) = %+v, %v; want TCG", r, err)
	}
}

// TestChooseWaits: whoever insists on KVM waits longer for it.
func TestChooseWaits(t *testing.T) {
	for wish, want := range map[hypervisor.Accelerator]time.Duration{hypervisor.Auto: HardLimit, hypervisor.KVM: Patience} {
		var got time.Duration
		_, _ = choose(context.Background(), wish, Config{Device: device, CacheDir: t.TempDir()}, func(_ context.Context, _ string, hard time.Duration) verdict {
			got = hard
			return verdict{Measured: true, NanosPerInstruction: 1}
		})
		if got != want && got != 0 { // 0: not supported here
			t.Errorf("Choose(%q) gives up after %v; want %v", wish, got, want)
		}
	}
}

func TestChooseEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := choose(ctx, hypervisor.Auto, Config{Device: device, CacheDir: t.TempDir()}, func(ctx context.Context, _ string, _ time.Duration) verdict {
		return verdict{err: ctx.Err()}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Choose() = %v; want a cancellation", err)
	}
}

// TestIntegrationChoose chooses for this machine.
func TestIntegrationChoose(t *testing.T) {
	cfg := Config{CacheDir: t.TempDir()}
	first, err := Choose(context.Background(), hypervisor.Auto, cfg)
	if err != nil {
		t.Fatalf("Choose(auto) = %v", err)
	}
	second, err := Choose(context.Background(), hypervisor.Auto, cfg)
	if err != nil || second.Accelerator != first.Accelerator || second.FromCache != (first.NanosPerInstruction > 0) {
		t.Errorf("Choose(auto) = %+v, then %+v, %v; want the same from the cache if it was measured", first, second, err)
	}
	t.Logf("%+v", first)
}
