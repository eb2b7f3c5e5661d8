//go:build cgo

package main

import _ "github.com/mattn/go-sqlite3" // registers "sqlite3"

const (
	sqliteDriver     = "sqlite3"
	sqliteModule     = "github.com/mattn/go-sqlite3"
	sqliteParameters = "?_journal_mode=WAL&_synchronous=FULL&_busy_timeout=5000"
)
