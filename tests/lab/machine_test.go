package main

import (
	"os/exec"
	"testing"
)

func TestQuote(t *testing.T) {
	for _, s := range []string{"", "plain", "two words", "it's", "'", "$HOME `id` \"x\" \\ \n end"} {
		out, err := exec.Command("sh", "-c", "printf %s "+quote(s)).Output()
		if string(out) != s || err != nil {
			t.Errorf("the shell reads %s as %q (%v); want %q", quote(s), out, err, s)
		}
	}
}

func TestCommandScript(t *testing.T) {
	t.Setenv("VMRT_WORD", "a b")
	t.Setenv("OTHER_WORD", "hidden")
	t.Chdir(t.TempDir())
	m := machine{Command: []string{"sh", "-c", `echo "$VMRT_WORD|$OTHER_WORD|$VMRT_LAB|$TMPDIR|$1"`, "sh", "it's"}}
	script, err := m.commandScript()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", string(script))
	cmd.Env = []string{}
	out, err := cmd.Output()
	if got, want := string(out), "a b||1|/var/tmp|it's\n"; got != want || err != nil {
		t.Errorf("output of the command = %q (%v); want %q", got, err, want)
	}
}
