package main

import "errors"

func fillOnPostgres(p place, keys int, newID idAt, done func(int)) error {
	return errors.ErrUnsupported
}
