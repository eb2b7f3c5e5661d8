package show

import (
	"fmt"
	"os"
	"strings"
)

// A bar shows on a terminal how far it has got; elsewhere nothing.
type bar struct {
	terminal     bool
	lines, kills int
	shown        string
}

const barWidth = 40

func (b *bar) start(lines, kills int) {
	info, err := os.Stderr.Stat()
	b.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	b.lines, b.kills = lines, kills
}

func (b *bar) draw(answered, killed int) {
	if !b.terminal || b.lines == 0 {
		return
	}
	full := barWidth * answered / b.lines
	text := fmt.Sprintf("\r[%s%s] %d/%d answered, %d/%d killed ", strings.Repeat("█", full), strings.Repeat("·", barWidth-full), answered, b.lines, killed, b.kills)
	if text != b.shown {
		b.shown = text
		fmt.Fprint(os.Stderr, text)
	}
}

func (b *bar) end() {
	if b.terminal {
		fmt.Fprint(os.Stderr, "\r\x1b[K")
	}
}
