package main

type reaping struct{}

func (b *bench) whileReaping() []step { return nil }
func (t *text) reaping()              {}
