package money_test

import (
	"testing"

	"example.com/keystate/examples/internal/money"
)

func TestAmountsReadLikeMoney(t *testing.T) {
	for cents, want := range map[int64]string{0: "0.00", 5: "0.05", 123_45: "123.45", 1_234_567_89: "1,234,567.89", -1_000_00: "-1,000.00"} {
		if got := money.Text(cents); got != want {
			t.Errorf("%d cents are %s, not %s", cents, got, want)
		}
	}
}
