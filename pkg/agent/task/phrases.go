package task

import (
	"regexp"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/status"
)

// Clients recognize failures by phrases of runc's messages; crun says the same
// in other words.

// The patterns are compiled at the first error: most agents see none.
var (
	// missing is crun's message for a program that is not there; which one
	// depends on the version, as with those that follow.
	missing = lazy("(?:executable file|cannot find) `([^`]*)` (?:in \\$PATH|not found(?: in \\$PATH)?): no such file or directory")
	// notExecutable and notRegular are its messages for one that cannot be run
	// and for a folder.
	notExecutable = lazy("the path `([^`]*)` exists but it is not executable: operation not permitted")
	notRegular    = lazy("the path `([^`]*)` is not a regular file: operation not permitted")
	notOpened     = lazy("open executable: (permission denied|operation not permitted)")
	// noCwd is its message for a working directory that cannot be entered.
	noCwd = lazy("chdir (?:to )?`([^`]*)`: ")
	// notNamespaced is its message for a sysctl that is not a container's own.
	notNamespaced = lazy("the sysctl `([^`]*)` is not namespaced")
)

func lazy(pattern string) func() *regexp.Regexp {
	return sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(pattern) })
}

// rephrase returns err in the words of runc, of the same code.
func rephrase(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	p := st.Proto()
	p.Message = rephraseText(p.Message)
	return status.FromProto(p).Err()
}

func rephraseText(s string) string {
	s = lowerErrno(s)
	s = missing().ReplaceAllStringFunc(s, func(m string) string {
		program := missing().FindStringSubmatch(m)[1]
		if strings.Contains(program, "/") {
			return `exec: "` + program + `": stat ` + program + `: no such file or directory`
		}
		return `exec: "` + program + `": executable file not found in $PATH`
	})
	s = notExecutable().ReplaceAllString(s, `exec: "$1": permission denied`)
	s = notRegular().ReplaceAllString(s, `exec: "$1": is a directory`)
	s = notOpened().ReplaceAllString(s, "exec: permission denied")
	s = notNamespaced().ReplaceAllString(s, `sysctl "$1" is not in a separate kernel namespace`)
	return noCwd().ReplaceAllString(s, `chdir to cwd ("$1") set in config.json failed: `)
}

// lowerErrno turns libc's texts of error numbers into Go's, which differ in
// the first letter.
func lowerErrno(s string) string {
	for errno := syscall.Errno(1); errno <= unix.EHWPOISON; errno++ {
		text := errno.Error()
		s = strings.ReplaceAll(s, ": "+strings.ToUpper(text[:1])+text[1:], ": "+text)
	}
	return s
}
