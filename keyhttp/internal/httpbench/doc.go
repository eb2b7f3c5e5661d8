// Package httpbench measures keyhttp over a loopback, side by side with the bare machine, a handler without keys, and
// another framework's idempotency middleware.
package httpbench
