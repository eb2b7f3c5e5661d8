package pgtest

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

var errNoPrograms = errors.New("no PostgreSQL server programs in PATH or /usr/lib/postgresql/*/bin: " +
	"install them (apt-get install postgresql, brew install postgresql), or name a running server in " + dsnVariable)

// Where distributions put server programs that are not in PATH: Debian, Red Hat, Homebrew, and PostgreSQL's own make
// install.
var programFolders = []string{
	"/usr/lib/postgresql/*/bin",
	"/usr/pgsql-*/bin",
	"/opt/homebrew/opt/postgresql@*/bin",
	"/usr/local/opt/postgresql@*/bin",
	"/usr/local/pgsql/bin",
}

// programs is the folder of one version's server programs.
type programs string

func (p programs) path(name string) string { return filepath.Join(string(p), name) }

func findPrograms() (programs, error) {
	if initdb, err := exec.LookPath("initdb"); err == nil {
		if p := programs(filepath.Dir(initdb)); p.complete() {
			return p, nil
		}
	}
	for _, pattern := range programFolders {
		folders, err := filepath.Glob(pattern)
		if err != nil {
			return "", fmt.Errorf("pgtest: %s: %w", pattern, err)
		}
		for _, folder := range newestFirst(folders) {
			if p := programs(folder); p.complete() {
				return p, nil
			}
		}
	}
	return "", errNoPrograms
}

func (p programs) complete() bool {
	for _, name := range []string{"initdb", "postgres", "pg_basebackup"} {
		if _, err := os.Stat(p.path(name)); err != nil {
			return false
		}
	}
	return true
}

// newestFirst sorts folders by the version in their names, by number: 15 comes before 9.6.
func newestFirst(folders []string) []string {
	return slices.SortedStableFunc(slices.Values(folders), func(a, b string) int {
		return cmp.Compare(folderVersion(b), folderVersion(a))
	})
}

func folderVersion(folder string) float64 {
	digits := strings.TrimLeftFunc(folder, func(r rune) bool { return r < '0' || '9' < r })
	if end := strings.IndexFunc(digits, func(r rune) bool { return r != '.' && (r < '0' || '9' < r) }); end >= 0 {
		digits = digits[:end]
	}
	version, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return 0 // no number: the least
	}
	return version
}
