// Command vmrtctl is the operator's tool: it tells whether a machine can run
// vmrt, and which sandboxes there are.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/vmrt/vmrt/pkg/check"
	"github.com/vmrt/vmrt/pkg/config"
	"github.com/vmrt/vmrt/pkg/state"
	"github.com/vmrt/vmrt/pkg/version"
)

func main() {
	if err := newApp().Run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "vmrtctl:", err)
		os.Exit(1)
	}
}

func newApp() *cli.App {
	app := &cli.App{
		Name:            "vmrtctl",
		Usage:           "look after vmrt, the containerd runtime that runs pods in virtual machines",
		HideVersion:     true,
		HideHelpCommand: true,
		OnUsageError:    usageError,
		Action:          unknown,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Usage: "configuration `FILE` (default: $VMRT_CONFIG or " + config.DefaultPath + ")"},
		},
		Commands: []*cli.Command{
			{Name: "check", Usage: "find out whether this machine can run virtual machines, and with what", Action: runCheck},
			{Name: "list", Usage: "list the sandboxes on this machine", Action: runList},
			{Name: "version", Usage: "print the version", Action: runVersion},
		},
	}
	for _, c := range app.Commands {
		c.Before, c.OnUsageError, c.HideHelpCommand = noArguments, usageError, true
	}
	return app
}

// unknown is for a command line without a command, or with one that there is not.
func unknown(c *cli.Context) error {
	switch name := c.Args().First(); name {
	case "", "help":
		return cli.ShowAppHelp(c)
	default:
		return fmt.Errorf("unknown command %q: `vmrtctl --help` lists them", name)
	}
}

func noArguments(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("%s takes no arguments: %q", c.Command.Name, c.Args().Slice())
	}
	return nil
}

// usageError keeps the help from standing between a wrong flag and its error.
func usageError(_ *cli.Context, err error, _ bool) error { return err }

// checkTimeout bounds all checks together; the accelerator probe bounds itself
// at 300 ms.
const checkTimeout = 10 * time.Second

func runCheck(c *cli.Context) error {
	ctx, cancel := context.WithTimeout(c.Context, checkTimeout)
	defer cancel()
	bad := 0
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, r := range check.Run(ctx, c.String("config")) {
		if r.Err != nil {
			bad++
			fmt.Fprintf(w, "FAIL\t%s\t%v\n", r.Name, r.Err)
			continue
		}
		fmt.Fprintf(w, "ok\t%s\t%s\n", r.Name, r.Found)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if bad > 0 {
		return fmt.Errorf("%d of the checks failed", bad)
	}
	return nil
}

func runList(c *cli.Context) error {
	settings, err := config.Load(c.String("config"))
	if err != nil {
		return err
	}
	all, listErr := state.Open(settings.StateDir).List()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAMESPACE\tSANDBOX\tCONTAINERS\tVM PID\tKERNEL\tACCELERATOR\tVSOCK\tAGE\tSTATE")
	for _, sb := range all {
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t%s\t%s\t%s\n", sb.Namespace, sb.ID, len(sb.Containers), sb.VM.Pid,
			sb.Kernel, sb.Accelerator, sb.Vsock, time.Since(sb.Created).Round(time.Second), condition(sb))
	}
	return errors.Join(w.Flush(), listErr)
}

// condition is one word for how a sandbox is.
func condition(sb *state.Sandbox) string {
	switch {
	case !sb.Shim.Alive():
		return "no-shim"
	case !sb.VM.Alive():
		return "no-vm"
	default:
		return "running"
	}
}

func runVersion(*cli.Context) error {
	fmt.Println("vmrtctl", version.Version, version.Revision)
	return nil
}
