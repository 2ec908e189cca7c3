package main

import (
	"bytes"
	"strings"
	"testing"
)

// A command line that means nothing is one error and no help text in front of it.
func TestCommandLine(t *testing.T) {
	const help = "USAGE"
	for _, tt := range []struct{ args, out, err string }{
		{"", help, ""},
		{"help", help, ""},
		{"--help", help, ""},
		{"list --help", help, ""},
		{"start", "", `unknown command "start"`},
		{"list mine", "", `list takes no arguments: ["mine"]`},
		{"check help", "", `check takes no arguments: ["help"]`},
		{"--state /run", "", "flag provided but not defined: -state"},
		{"list --all", "", "flag provided but not defined: -all"},
		{"--config", "", "flag needs an argument: -config"},
	} {
		app := newApp()
		var out bytes.Buffer
		app.Writer, app.ErrWriter = &out, &out
		err := app.Run(append([]string{"vmrtctl"}, strings.Fields(tt.args)...))
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.err)) {
			t.Errorf("vmrtctl %s = %v; want %q", tt.args, err, tt.err)
		}
		if tt.out == "" && out.Len() > 0 || !strings.Contains(out.String(), tt.out) {
			t.Errorf("vmrtctl %s prints %q; want %q", tt.args, out.String(), tt.out)
		}
	}
}
