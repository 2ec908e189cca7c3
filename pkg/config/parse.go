package config

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/vmrt/vmrt/pkg/hypervisor"
)

// file is the form of the TOML file. Its fields hold the defaults when it is
// decoded.
type file struct {
	Accelerator    string `toml:"accelerator"`
	Vsock          string `toml:"vsock"`
	Kernel         string `toml:"kernel"`
	GuestDir       string `toml:"guest_dir"`
	QEMU           string `toml:"qemu"`
	Virtiofsd      string `toml:"virtiofsd"`
	Passt          string `toml:"passt"`
	MemoryMiB      int    `toml:"memory_mib"`
	CPUs           int    `toml:"cpus"`
	LateInterfaces int    `toml:"late_interfaces"`
	BootTimeout    string `toml:"boot_timeout"`
	StateDir       string `toml:"state_dir"`
}

// Parse is Load for the content of a file; name is for errors. An error names
// every key that is unknown, with its line, or every value that is wrong.
func Parse(name string, data []byte) (*Config, error) {
	d := defaults()
	f := file{
		Accelerator: string(d.Accelerator), Vsock: d.Vsock, Kernel: d.Kernel, MemoryMiB: d.MemoryMiB, CPUs: d.CPUs, LateInterfaces: d.LateInterfaces,
		BootTimeout: d.BootTimeout.String(), StateDir: d.StateDir,
	}
	dec := toml.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", name, explain(err))
	}
	timeout, err := time.ParseDuration(f.BootTimeout)
	if err != nil {
		return nil, fmt.Errorf("configuration %s: boot_timeout = %q: want a duration such as \"30s\"", name, f.BootTimeout)
	}
	c := &Config{
		File: name, Accelerator: hypervisor.Accelerator(f.Accelerator), Vsock: f.Vsock, Kernel: f.Kernel,
		GuestDir: f.GuestDir, QEMU: f.QEMU, Virtiofsd: f.Virtiofsd, Passt: f.Passt, MemoryMiB: f.MemoryMiB, CPUs: f.CPUs, LateInterfaces: f.LateInterfaces,
		BootTimeout: timeout, StateDir: f.StateDir,
	}
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("configuration %s: %w", name, err)
	}
	return c, nil
}

// explain says with the line what the TOML decoder found.
func explain(err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var errs []error
		for i := range strict.Errors {
			line, _ := strict.Errors[i].Position()
			errs = append(errs, fmt.Errorf("line %d: unknown key %s", line, strings.Join(strict.Errors[i].Key(), ".")))
		}
		return errors.Join(errs...)
	}
	var decode *toml.DecodeError
	if !errors.As(err, &decode) {
		return err
	}
	line, _ := decode.Position()
	said := strings.TrimPrefix(decode.Error(), "toml: ")
	// What is wrong with a key and not with its value begins so: a key that is
	// there twice.
	if key := strings.Join(decode.Key(), "."); key != "" && !strings.HasPrefix(said, "key ") {
		return fmt.Errorf("line %d: %s: want %s", line, key, kindOf(key))
	}
	return fmt.Errorf("line %d: %s", line, said)
}

func kindOf(key string) string {
	if key == "memory_mib" || key == "cpus" || key == "late_interfaces" {
		return "a whole number"
	}
	return "a string"
}
