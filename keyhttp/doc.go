// Package keyhttp puts the Idempotency-Key header in front of net/http handlers: the same request twice has the same result.
//
// There are two ways in. [Handle] puts a machine behind an endpoint. It is the strong way: the answer is stored in the transaction
// that finishes the key, a request that was cut off goes on from its last recovery point, with the client's retry or by itself
// after a restart, and every retry gets the first answer byte for byte, also from a later release.
//
//	transfers, err := keyhttp.Handle(engine, "transfer", phases, keyhttp.Endpoint[Transfer]{
//		Options: keyhttp.Options{Scope: account},
//		Decode:  decodeTransfer, // request → state, before anything is claimed
//		Encode:  encodeTransfer, // state → answer, once
//	})
//	mux.Handle("POST /v1/transfers", transfers)
//
// [Middleware] goes around any handler. It is the easy way, and weaker: it knows nothing of what the handler does, so a handler
// that a crash cut off has to run again from its beginning, or ([Options.AtMostOnce]) stays parked until an operator has looked.
//
// [Transport] is the client's side: it mints keys and keeps them over retries. [Mint] lets a server mint them.
//
// # What is sent over the wire
//
// The key travels as draft-ietf-httpapi-idempotency-key-header has it, a structured string (RFC 9651), or bare as Stripe's clients
// send it. Errors are problem details (RFC 9457); each Problem's comment below says which status and type mean what. docs/http.md
// compares all of it with the draft and with Stripe, row by row.
package keyhttp
