//go:build !linux

package main

import "os"

func syncContents(f *os.File) error { return f.Sync() }
