// Package keytest proves that a program's phases survive: every crash, every lost answer, every restart with another release.
//
// [Crash] runs a program's own phases on a real store, once without a fault to see where one may strike, and then once for every
// place and fault, and compares what comes of it with the run without. [Property] does the same with requests that rapid
// draws, and shrinks what fails. [World] plays the other side of effects. [Store] is for who writes a store: it
// checks that the store keeps what [keystate.Store] promises. [Idle] waits until an engine has nothing left to do.
//
// docs/testing.md is an introduction of five minutes.
package keytest
