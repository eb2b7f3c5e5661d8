package main

type fullness struct{}

func (b *bench) onFullStores() []step { return nil }
func (t *text) stored()               {}
