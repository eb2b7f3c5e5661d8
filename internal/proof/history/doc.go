// Package history proves that concurrent calls of Machine.Do, with crashes in between, behave as if each had taken
// place at one instant.
//
// Its test lets clients call Do on a few keys with equal and different requests, and operators retry and abandon parked keys, while the
// engine dies again and again, before or after a commit, and another one takes the bbolt file up; keys are reaped, and used
// again. Every call is recorded with the moments at which it began and ended; one whose answer was lost may have happened, or
// not, as long as its engine existed. Porcupine then looks, key by key, for an order of the calls in which each answer is the one that a
// key without concurrency and crashes would have given: one answer to one request for the key's life, a mismatch to any other, and
// another answer only after a reaping. Beside it stands a plain count, which knows nothing of orders: of each life, every row that
// its commits write is there once, its effect had one token and was not called any more once the life was answered, and none
// was reaped before its time.
//
// A death here lets a commit that is under way end: what an answer is worth that comes before bbolt has
// written is for package kill to find.
//
// More:
//
//	go test ./internal/proof/history -run HistoryHas -operations=1000000 -timeout=0 -v
package history
