package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Lists of modules to load, one path on a line, in load order. A kernel
// without modules comes without them.
const (
	modulesList     = "/lib/vmrt/modules"
	modulesLateList = "/lib/vmrt/modules.late"
)

// moduleCompressed lets the kernel unpack the file itself
// (MODULE_INIT_COMPRESSED_FILE, include/uapi/linux/module.h).
const moduleCompressed = 4

// lateModules loads the modules that the services do not need. One that the
// machine has no use for does not load, which is for the log only.
func lateModules() error {
	paths, err := readList(modulesLateList)
	for _, path := range paths {
		if err := loadModule(path); err != nil {
			log.L.WithError(err).Debug("boot")
		}
	}
	return err
}

// loadModules loads a list up to the first error.
func loadModules(list string) error {
	paths, err := readList(list)
	if err != nil {
		return err
	}
	for _, path := range paths {
		if err := loadModule(path); err != nil {
			return err
		}
	}
	return nil
}

func readList(list string) ([]string, error) {
	if unix.Access(list, unix.F_OK) == unix.ENOENT {
		return nil, nil
	}
	b, err := os.ReadFile(list)
	return strings.Fields(string(b)), err
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("load module: %w", err)
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = moduleCompressed
	}
	err = unix.FinitModule(int(f.Fd()), parameters(path), flags)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", path, err)
	}
	return nil
}

// parameters returns those of the module at a path. A kernel that has the
// module built in takes them from its command line, as "dummy.numdummies=0".
func parameters(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".")
	if name == "dummy" {
		return "numdummies=0" // the pod's interfaces are all that there are
	}
	return ""
}
