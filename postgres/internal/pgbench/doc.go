// Package pgbench measures keystate's store in PostgreSQL beside other ways to make the same request on the same server:
// written by hand with pgx, and with DBOS. It is a module of its own, so that what they need is nobody else's.
//
// It consists of benchmarks alone. docs/bench.md in the root has the commands, and what they gave.
package pgbench
