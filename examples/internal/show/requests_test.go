package show

import "testing"

func TestEachLineIsAskedOfTwoWorkersWhereThereAreSeveral(t *testing.T) {
	lines := make([]line, 10)
	for i := range lines {
		lines[i].number = i + 1
	}
	for desks := 1; desks <= 4; desks++ {
		asked := map[int]int{}
		for desk := range desks {
			for _, l := range deal(lines, desk, desks) {
				asked[l.number]++
			}
		}
		for _, l := range lines {
			if want := min(desks, 2); asked[l.number] != want {
				t.Errorf("of %d workers, %d are asked line %d, want %d", desks, asked[l.number], l.number, want)
			}
		}
	}
}
