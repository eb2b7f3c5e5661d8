package keytest

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"time"
)

// leaves takes a value apart into what can be compared and shown: a path for each scalar that is not zero. A nil map is like
// an empty one, a pointer like what it points to; times are compared in UTC; functions and channels are passed over.
func leaves(v any) map[string]string {
	found := map[string]string{}
	walk(reflect.ValueOf(v), "", 0, found)
	return found
}

const deepest = 64 // levels: what goes on from there points at itself

func walk(v reflect.Value, path string, depth int, found map[string]string) {
	if !v.IsValid() || depth > deepest {
		return
	}
	if v.CanInterface() {
		if t, ok := v.Interface().(time.Time); ok {
			if !t.IsZero() {
				found[path] = t.UTC().Format(time.RFC3339Nano)
			}
			return
		}
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		walk(v.Elem(), path, depth+1, found)
	case reflect.Struct:
		for i := range v.NumField() {
			walk(v.Field(i), join(path, v.Type().Field(i).Name), depth+1, found)
		}
	case reflect.Map:
		for _, key := range v.MapKeys() {
			walk(v.MapIndex(key), join(path, name(key)), depth+1, found)
		}
	case reflect.Slice, reflect.Array:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			note(v, path, found)
			return
		}
		for i := range v.Len() {
			walk(v.Index(i), join(path, strconv.Itoa(i)), depth+1, found)
		}
	case reflect.Func, reflect.Chan, reflect.UnsafePointer:
	default:
		note(v, path, found)
	}
}

func note(v reflect.Value, path string, found map[string]string) {
	if !v.IsZero() && !(v.Kind() == reflect.Slice && v.Len() == 0) {
		found[path] = text(v)
	}
}

// text spells a scalar, and a string of bytes as a string.
func text(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		return text(v.Elem())
	case reflect.String:
		return strconv.Quote(v.String())
	case reflect.Slice, reflect.Array:
		b := make([]byte, v.Len())
		for i := range b {
			b[i] = byte(v.Index(i).Uint())
		}
		return strconv.Quote(string(b))
	}
	return fmt.Sprint(v)
}

// name spells the key of a map.
func name(v reflect.Value) string {
	spelled := text(v)
	if plain, err := strconv.Unquote(spelled); err == nil && strconv.Quote(plain) == `"`+plain+`"` {
		return plain
	}
	return spelled
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// A difference is between what a run without a fault has come to and what another has.
type difference struct {
	path, want, got string
}

func (d difference) String() string {
	return fmt.Sprintf("%s is %s; without a fault it is %s", d.path, shown(d.got), shown(d.want))
}

// shown bounds what is printed of a value.
func shown(v string) string {
	const most = 120
	switch {
	case v == "":
		return "empty"
	case len(v) > most:
		return v[:most] + "…"
	}
	return v
}

// differences compares two sets of leaves, but for the paths that vary by right.
func differences(want, got map[string]string, varies func(path string) bool) (all []difference) {
	paths := maps.Clone(want)
	maps.Copy(paths, got)
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		if want[path] != got[path] && !varies(path) {
			all = append(all, difference{path, want[path], got[path]})
		}
	}
	return all
}

// nothing varies.
func nothing(string) bool { return false }

// under puts a name before every path.
func under(name string, all map[string]string) map[string]string {
	named := make(map[string]string, len(all))
	for path, v := range all {
		if path != "" {
			named[name+" "+path] = v
		} else {
			named[name] = v
		}
	}
	return named
}
