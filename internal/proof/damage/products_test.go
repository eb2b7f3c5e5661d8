//go:build linux || darwin

package damage

// products are what is shown the files: keystate, and what is wrong on purpose.
var products = map[string]product{"keystate": sound}
