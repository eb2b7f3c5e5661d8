//go:build !cgo

package main

const (
	sqliteDriver     = pureDriver
	sqliteModule     = pureModule
	sqliteParameters = pureParameters
)
