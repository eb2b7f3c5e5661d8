// Package keytest proves that a program's phases survive: every crash, every lost answer, every restart with another release.
//
// [Crash] runs a program's own phases on a real store, once without a fault to see where one may strike, and then once for every
// place and fault, and compares what comes of it with the run without. [Property] does the same with requests that rapid
// draws, and shrinks what fails. [World] plays the other side of effects. [Store] is for who writes a store: it
// checks that the store keeps what [keystate.Store] promises. [Idle] waits until an engine has nothing left to do.
//
// docs/testing.md is an introduction of five minutes. The files:
//
//	crash.go        Case, Crash, and the scenarios that a case gives rise to
//	play.go         one scenario, process after process, until its end
//	process.go      one process: it stands between the engine, the store and the phases, and can die at any place
//	shared.go       processes that have one store open together, and those that stand still too long
//	connections.go  a process's way to a server, which breaks when it dies
//	judge.go        what an end differs in from the run without a fault, and what probably causes it
//	compare.go      values as what can be compared and shown
//	world.go        the other side of effects
//	property.go     Crash for requests that rapid draws
//	store.go        Store; what it checks is in internal/conformance
package keytest
