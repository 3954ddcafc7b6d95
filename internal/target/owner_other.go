//go:build !unix

package target

import "io/fs"

// owner is unknown where files have no user number.
func owner(fs.FileInfo) (uid int, ok bool) { return 0, false }
