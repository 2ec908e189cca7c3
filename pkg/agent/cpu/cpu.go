// Package cpu brings the machine's CPUs online and takes them offline, by
// sysfs (Documentation/ABI/testing/sysfs-devices-system-cpu).
package cpu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Root is sysfs's folder of CPUs.
const Root = "/sys/devices/system/cpu"

// state is one CPU that the machine has.
type state struct {
	number int
	file   string // empty for one that cannot go offline
	online bool
}

// SetOnline brings CPUs online, lowest number first, or takes them offline,
// highest first, until count are online. CPU 0 stays online. On an error some
// may have changed. Calls must not be concurrent.
func SetOnline(root string, count int) error {
	cpus, err := list(root)
	if err != nil {
		return fmt.Errorf("list CPUs: %w", err)
	}
	if count < 1 || count > len(cpus) {
		return fmt.Errorf("%d CPUs online: the machine has %d: %w", count, len(cpus), errdefs.ErrOutOfRange)
	}
	online := countOnline(cpus)
	for _, c := range cpus {
		if online >= count {
			break
		}
		if !c.online {
			if err := c.set("1"); err != nil {
				return err
			}
			online++
		}
	}
	for _, c := range slices.Backward(cpus) {
		if online <= count {
			break
		}
		if c.online && c.file != "" && c.number != 0 {
			if err := c.set("0"); err != nil {
				return err
			}
			online--
		}
	}
	return nil
}

// Online returns how many CPUs are online.
func Online(root string) (int, error) {
	cpus, err := list(root)
	if err != nil {
		return 0, fmt.Errorf("list CPUs: %w", err)
	}
	return countOnline(cpus), nil
}

func countOnline(cpus []state) int {
	online := 0
	for _, c := range cpus {
		if c.online {
			online++
		}
	}
	return online
}

func (s state) set(value string) error {
	if err := os.WriteFile(s.file, []byte(value), 0); err != nil {
		return fmt.Errorf("set CPU %d online to %s: %w", s.number, value, err)
	}
	return nil
}

func list(root string) ([]state, error) {
	dirs, err := filepath.Glob(filepath.Join(root, "cpu[0-9]*"))
	if err != nil {
		return nil, err
	}
	var cpus []state
	for _, dir := range dirs {
		number, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), "cpu"))
		if err != nil {
			continue
		}
		s := state{number: number, online: true}
		file := filepath.Join(dir, "online")
		b, err := os.ReadFile(file)
		switch {
		case errors.Is(err, fs.ErrNotExist): // always online
		case err != nil:
			return nil, err
		default:
			s.file, s.online = file, strings.TrimSpace(string(b)) == "1"
		}
		cpus = append(cpus, s)
	}
	slices.SortFunc(cpus, func(a, b state) int { return a.number - b.number })
	return cpus, nil
}
