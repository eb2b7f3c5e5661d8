package keystate

import "errors"

// ErrWithdrawn and Withdraw stand here until the engine has them.
var ErrWithdrawn = errors.New("keystate: withdrawn")

func Withdraw(err error) error { return err }
