package discovery

import "syscall"

const sysStatAt = syscall.SYS_FSTATAT
