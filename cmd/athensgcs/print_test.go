package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestVisible(t *testing.T) {
	for text, want := range map[string]string{
		"":                              "",
		`C:\go "ü 世界" 'x'`:              `C:\go "ü 世界" 'x'`,
		"a\r\x1b[2K\x1b]0;owned\x07\nb": `a\r\x1b[2K\x1b]0;owned\a\nb`,
		"\u202egpj.exe\u2066 \u200f\ufeff\u2028\u0085\x7f": `\u202egpj.exe\u2066 \u200f\ufeff\u2028\u0085\x7f`,
		"bad \xff\xc3 utf": `bad \xff\xc3 utf`,
		"'":                "'",
		"\ufffd":           "\ufffd",
	} {
		assert.Equal(t, want, visible(text))
	}
}
