// Command euid prints its effective user id. An image holds it with the
// set-user-id bit, which no_new_privs makes void.
package main

import (
	"fmt"
	"os"
)

func main() { fmt.Printf("Effective uid: %d\n", os.Geteuid()) }
