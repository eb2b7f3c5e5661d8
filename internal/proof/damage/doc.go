// Package damage proves what docs/guarantees.md says of damaged and foreign files: whatever is done to a store's file, Open
// either refuses it with a named error, and leaves it and all around it as it was, or what it then shows is, byte for byte,
// what had been committed, and every key can go on.
//
// Stores are made with the exported API and recorded commit by commit. Their files are then damaged in some thirty ways, each
// chosen by a seed (bbolt gives out pages as it likes, so -artifacts keeps the file), and judged in child processes, so that a crash, a hang or a hunger for memory
// is one file's and not the test's end. A judge that never objects proves nothing: the same files are shown to openers that are
// wrong on purpose, and every one of them must be found out.
//
//	go test ./internal/proof/damage
//	go test ./internal/proof/damage -v -timeout=0 -damaged 1000000
//	go test ./internal/proof/damage -v -artifacts -run DamagedFile -damaged-seed 4711
//	go test ./internal/proof/damage -v -artifacts -run LargeFile -damaged-large 2000
package damage
