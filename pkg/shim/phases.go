package shim

import (
	"context"
	"time"

	"github.com/containerd/log"
)

// launched is when this process began, nearly.
var launched = time.Now()

// phases are how long the parts of a request took, for the log.
type phases struct {
	begin, last time.Time
	fields      log.Fields
}

// startPhases begins the first part.
func startPhases() *phases {
	now := time.Now()
	return &phases{begin: now, last: now, fields: log.Fields{}}
}

// end ends a part and begins the next.
func (p *phases) end(name string) {
	now := time.Now()
	p.fields[name] = now.Sub(p.last)
	p.last = now
}

// log says at debug level that the request has succeeded. "took" is the whole
// of it, and "age" that of this process at its begin.
func (p *phases) log(ctx context.Context, msg, container string) {
	p.fields["container"], p.fields["took"], p.fields["age"] = container, time.Since(p.begin), p.begin.Sub(launched)
	log.G(ctx).WithFields(p.fields).Debug(msg)
}
