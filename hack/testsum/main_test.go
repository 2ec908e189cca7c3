package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestSummary(t *testing.T) {
	for _, tt := range []struct {
		name, in, line, out string
	}{
		{
			name: "subtests count instead of their parent",
			in: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/x"}
{"Action":"run","Package":"p","Test":"A/x/y"}
{"Action":"pass","Package":"p","Test":"A/x/y"}
{"Action":"pass","Package":"p","Test":"A/x"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p","Elapsed":1}`,
			line: "1 passed, 0 failed, 0 skipped",
			out:  "ok    p: 3 tests, 1.0 s",
		},
		{
			name: "a failed test shows its output",
			in: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"    a_test.go:1: got 1; want 2\n"}
{"Action":"fail","Package":"p","Test":"A","Elapsed":0.5}
{"Action":"fail","Package":"p"}`,
			line: "0 passed, 1 failed, 0 skipped",
			out:  "a_test.go:1: got 1; want 2",
		},
		{
			name: "a skipped test shows why",
			in: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"    a_test.go:1: needs root\n"}
{"Action":"output","Package":"p","Test":"A","Output":"--- SKIP: A (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}`,
			line: "0 passed, 0 failed, 1 skipped",
			out:  "skip  p A: a_test.go:1: needs root",
		},
		{
			name: "a package that does not build is a failure",
			in: `{"ImportPath":"p","Action":"build-output","Output":"x.go:1: syntax error\n"}
{"ImportPath":"p","Action":"build-fail"}
{"Action":"start","Package":"p"}
{"Action":"fail","Package":"p","FailedBuild":"p"}`,
			line: "0 passed, 1 failed, 0 skipped",
			out:  "x.go:1: syntax error",
		},
		{
			name: "a crash counts once",
			in: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Output":"panic: boom\n"}
{"Action":"fail","Package":"p"}`,
			line: "0 passed, 1 failed, 0 skipped",
			out:  "panic: boom",
		},
		{
			name: "a test that never ended has failed",
			in: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"as far as it came\n"}
{"Action":"run","Package":"p","Test":"B"}
{"Action":"pass","Package":"p","Test":"B"}
{"Action":"fail","Package":"p"}`,
			line: "1 passed, 1 failed, 0 skipped",
			out:  "FAIL  p A (0.0 s)\nas far as it came",
		},
		{
			name: "other lines are passed on",
			in:   "go: no such module",
			line: "0 passed, 0 failed, 0 skipped",
			out:  "go: no such module",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			s := newSummary(&out)
			if err := s.read(strings.NewReader(tt.in)); err != nil {
				t.Fatal(err)
			}
			if got := s.line(); got != tt.line {
				t.Errorf("line() = %q; want %q", got, tt.line)
			}
			if !strings.Contains(out.String(), tt.out) {
				t.Errorf("output = %q; want it to contain %q", out.String(), tt.out)
			}
		})
	}
}
