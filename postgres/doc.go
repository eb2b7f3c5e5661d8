// Package postgres keeps keystate's keys in PostgreSQL, so that many processes on many machines share them, and so that a phase's
// writes go into the program's own database in the transaction that moves the key.
//
//	store, err := postgres.Open(ctx, "postgres://…", nil)
//	engine, err := keystate.New(store, nil)
//	transfers, err := keystate.Register(engine, "transfer", []keystate.Phase[pgx.Tx, Transfer]{…})
//
// Phases, machines and everything else are as with a file. What differs is that several engines have the store open: each has a
// lease, by the server's clock, and the keys of one whose lease has run out are taken over by the others.
//
//	postgres.go  Open, New, Options
//	schema.go    the tables, and how they come to be there
//	tx.go        a transaction: what goes to the server together
//	update.go    transactions: run again, undone, or settled when the connection was lost in the middle of a commit
//	keys.go      the records in a transaction
//	line.go      a connection, hung up on when its server says nothing
//	lease.go     who holds what
//	errors.go    what PostgreSQL's errors mean
package postgres
