// Package kill proves that what a client was told survives kill -9.
//
// Its test starts its own binary as a child that has a store open with full syncs and serves concurrent clients, and kills it
// at random moments: while it starts, while it makes or opens the file, while it recovers, at work, and while it closes. The
// clients and the outside world live in the parent, which survives; it remembers every answer and every call of an effect. A new
// child takes the same file up, and the clients ask again with the same keys. The parent judges all the while: an answer that was
// acknowledged stays the same byte for byte until its key is reaped; no effect is called under two tokens, nor once its result is
// known to be durable; money is neither made nor lost; every row that the program writes is there exactly once; every key
// ends; the file is sound after every kill that is looked into, opens within a second, and the child's memory stays within bounds.
//
// What kill -9 does not show: the kernel keeps what a killed process has written, so a store that never syncs
// passes this test. That takes a power cut, which the root package's tests build from recorded writes. With -dir, the stores
// live on a disk of yours, and with -after-kill, a command is run after each kill, such as one that cuts that disk's power; the
// module internal/proof/power has both.
//
// A soak:
//
//	go test ./internal/proof/kill -run KillNine -cycles=100000 -timeout=0 -v
package kill
