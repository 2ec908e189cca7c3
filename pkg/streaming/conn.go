package streaming

import (
	"context"
	"reflect"
)

// connection returns the context of the connection that a ttrpc request came
// over, which ends with it, or nil.
//
// A stream's end can only be sent by returning from the RPC, and that ends the
// RPC's context as well; but whether a client has read the end shows by its
// closing the connection. ttrpc has no other access to that than that the
// request's context is made from the connection's, and package context has none
// to a context's parent but its types' embedded field, which is exported. Where
// that finds nothing, TestConnection fails, and Finish does not wait.
func connection(ctx context.Context) context.Context {
	for parent := ctx; ; {
		v := reflect.Indirect(reflect.ValueOf(parent))
		if v.Kind() != reflect.Struct {
			return nil
		}
		f := v.FieldByName("Context")
		if !f.IsValid() || !f.CanInterface() {
			return nil
		}
		next, ok := f.Interface().(context.Context)
		if !ok {
			return nil
		}
		if next.Done() != ctx.Done() {
			return next
		}
		parent = next
	}
}
