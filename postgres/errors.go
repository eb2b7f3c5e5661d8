package postgres

import (
	"errors"
	"fmt"

	"example.com/keystate"
	"github.com/jackc/pgx/v5/pgconn"
)

// What PostgreSQL says (https://www.postgresql.org/docs/current/errcodes-appendix.html).
const (
	serializationFailure = "40001"
	deadlockDetected     = "40P01"
	diskFull             = "53100"
	undefinedTable       = "42P01"
	invalidSchema        = "3F000"
	uniqueViolation      = "23505"
	duplicateTable       = "42P07"
	duplicateSchema      = "42P06"
	duplicateObject      = "42710"
	readOnly             = "25006"
	inFailedTransaction  = "25P02"
	notSupported         = "0A000"
	tooManyConnections   = "53300"
	invalidText          = "22P02" // what the cast in a fenced last write makes
)

func code(err error) string {
	var said *pgconn.PgError
	if errors.As(err, &said) {
		return said.Code
	}
	return ""
}

// crossed says whether the server ended a transaction because of others: run again, it may well succeed.
func crossed(err error) bool {
	c := code(err)
	return c == serializationFailure || c == deadlockDetected
}

// cutOff says whether the connection was lost, or the server is going away: what was not committed is undone.
func cutOff(err error) bool {
	if err == nil {
		return false
	}
	var refused *pgconn.ConnectError
	var said *pgconn.PgError
	switch isRefused := errors.As(err, &refused); {
	case errors.As(err, &said):
		ended := said.SeverityUnlocalized == "PANIC" || said.SeverityUnlocalized == "FATAL"          // and with it what the server knows of the transaction
		return said.Code[:2] == "08" || said.Code[:3] == "57P" || said.Code == tooManyConnections || // connection exceptions; admin_shutdown, crash_shutdown, cannot_connect_now
			ended && !isRefused
	case isRefused:
		return true
	}
	return pgconn.SafeToRetry(err) || isNetwork(err)
}

// refusesWrites says whether the server takes no writes: it is a standby, which knows no serializable transactions either, or nobody is to write there.
func refusesWrites(err error) bool {
	var said *pgconn.PgError
	if !errors.As(err, &said) {
		return false
	}
	return said.Code == readOnly || said.Code == notSupported && (said.Routine == "call_enum_check_hook" || said.Routine == "GetSerializableTransactionSnapshot")
}

// faulted says whether the server refused a commit for what was written, such as a constraint that is checked only then. What remains is the server's
// own trouble: no room or memory, an operator, its files, itself.
func faulted(err error) bool {
	c := code(err)
	if c == "" {
		return false
	}
	switch c[:2] {
	case "53", "57", "58", "XX":
		return false
	}
	return true
}

func missing(err error) bool {
	c := code(err)
	return c == undefinedTable || c == invalidSchema
}

// madeMeanwhile says that another process has just made what was to be made.
func madeMeanwhile(err error) bool {
	switch code(err) {
	case uniqueViolation, duplicateTable, duplicateSchema, duplicateObject:
		return true
	}
	return false
}

// meaning gives an error of the server's the name that keystate has for it.
func (s *Store) meaning(err error) error {
	switch {
	case err == nil:
		return nil
	case code(err) == diskFull:
		return fmt.Errorf("%w: %w", keystate.ErrStorageFull, err)
	case s.open() != nil:
		return fmt.Errorf("%w: %w", keystate.ErrClosed, err)
	}
	return err
}
