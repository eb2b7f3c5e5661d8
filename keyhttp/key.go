package keyhttp

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/google/uuid"
)

const (
	keyHeader      = "Idempotency-Key"
	replayedHeader = "Idempotent-Replayed"
)

const maxKey = 255 // bytes, of the key as it is stored

// parseKey reads a key as the header spells it: a structured string (RFC 9651, section 3.3.3), or the bare value. Both spell the
// same key. Bare values are visible ASCII without what would make two keys of one, or half of a quoted one.
func parseKey(value string, strict bool) (string, error) {
	value = strings.Trim(value, " \t")
	var id string
	switch {
	case value == "":
		return "", errors.New("the key is empty")
	case strict || value[0] == '"':
		item, err := httpsfv.UnmarshalItem([]string{value})
		if err != nil {
			return "", fmt.Errorf("the key is no structured string: %w", err)
		}
		var isString bool
		if id, isString = item.Value.(string); !isString {
			return "", errors.New("the key is no structured string: put it into double quotes")
		}
	default:
		for _, c := range []byte(value) {
			switch {
			case c < ' ' || c > '~':
				return "", errors.New("the key is not ASCII")
			case strings.IndexByte(` ",;\`, c) >= 0:
				return "", fmt.Errorf("the key contains %q and is not quoted", c)
			}
		}
		id = value
	}
	switch {
	case id == "":
		return "", errors.New("the key is empty")
	case len(id) > maxKey:
		return "", fmt.Errorf("the key has %d bytes, the limit is %d", len(id), maxKey)
	}
	return id, nil
}

// spell writes a key as a structured string.
func spell(id string) string {
	s, err := httpsfv.Marshal(httpsfv.NewItem(id))
	if err != nil {
		return ""
	}
	return s
}

// A spelling is a key and how its client wrote it.
type spelling struct{ id, raw string }

// spelledKey finds the key of a request, or none.
func (o *Options) spelledKey(r *http.Request) (s spelling, problem *Problem) {
	header, err := o.one(r.Header.Values(keyHeader))
	if err != nil {
		return s, newProblem(KeyMalformed, "The header Idempotency-Key: %v.", err)
	}
	if o.QueryParameter == "" {
		return header, nil
	}
	query, err := o.one(r.URL.Query()[o.QueryParameter])
	switch {
	case err != nil:
		return s, newProblem(KeyMalformed, "The query parameter %s: %v.", o.QueryParameter, err)
	case query.id == "":
		return header, nil
	case header.id == "":
		return spelling{query.id, spell(query.id)}, nil
	case header.id != query.id:
		return s, newProblem(KeyAmbiguous, "The header Idempotency-Key and the query parameter %s name different keys. Send one of them.", o.QueryParameter)
	}
	return header, nil
}

func (o *Options) one(values []string) (spelling, error) {
	switch len(values) {
	case 0:
		return spelling{}, nil
	case 1:
		id, err := parseKey(values[0], o.Strict)
		return spelling{id, strings.Trim(values[0], " \t")}, err
	}
	return spelling{}, fmt.Errorf("there are %d of them", len(values))
}

// tooOld says whether a key was minted longer ago than unknown keys live. Only a UUIDv7 says when it was minted.
func (o *Options) tooOld(id string) bool {
	if o.KeyLife == 0 {
		return false
	}
	u, err := uuid.Parse(id)
	if err != nil || u.Version() != 7 {
		return false
	}
	seconds, nanoseconds := u.Time().UnixTime()
	return time.Since(time.Unix(seconds, nanoseconds)) > o.KeyLife
}
