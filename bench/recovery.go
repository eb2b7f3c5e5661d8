package main

type resumption struct{}
type staging struct{}

const crashCommand = "crash"

func crash([]string) int { return 2 }

func (b *bench) recovering() []step { return nil }
func (t *text) recovery()           {}
