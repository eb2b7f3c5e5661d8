//go:build race && (linux || darwin)

package damage

// The race detector multiplies time and memory: fewer files, and none is blamed for what it holds.
const slowdown, memoryFactor = 16, 16
