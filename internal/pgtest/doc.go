// Package pgtest starts real PostgreSQL servers for tests, makes them fail, and watches what goes over their
// connections.
//
// [Database] is what most tests need: a database of the test's own, on a server that all tests of the package share.
// [Start] gives a test a whole server, which it may kill, restart and starve; [StartPair] a primary with a synchronous
// standby. A [Proxy] stands between a client and a server, counts, delays, and cuts at an exact place.
//
// The server programs are those found on the machine, in PATH or where distributions put them. Where there are none,
// a test is skipped with a line that says how to get them, or fails where KEYSTATE_MUST_POSTGRES=1. A server that
// runs already is named by KEYSTATE_POSTGRES_DSN: [Database] makes databases there, and a test that needs a server of
// its own is skipped.
//
// A server runs as whoever runs the tests, or, since PostgreSQL refuses root, as "postgres" or "nobody" where that is
// root. It ends, and its directory goes, with the test, and also when the test's process panics or is killed.
package pgtest
