package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// print prints lines of text, or with -json the value. Whatever a line holds, it
// stays one line; see visible.
func (p *program) print(value any, lines ...string) error {
	return p.progress.aside(func() error {
		if p.json {
			encoder := json.NewEncoder(p.stdout)
			encoder.SetEscapeHTML(false)
			return encoder.Encode(value)
		}
		for _, line := range lines {
			if _, err := fmt.Fprintln(p.stdout, visible(line)); err != nil {
				return err
			}
		}
		return nil
	})
}

// A summary is what a command prints last.
type summary interface {
	String() string
	empty() bool
}

// summarize prints the summary, which is marked if the command has stopped early
// for err, and returns the first error.
func (p *program) summarize(err error, s summary) error {
	p.progress.done()
	text := s.String()
	if err != nil {
		if s.empty() {
			return err
		}
		text = "until it stopped: " + text
	}
	failed := p.print(struct {
		Summary summary `json:"summary"`
		Stopped bool    `json:"stopped,omitempty"`
	}{s, err != nil}, text)
	if err != nil {
		return err
	}
	return failed
}

// oneLine returns the message of an error without the line ends in it; answers of
// servers have some.
func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// visible returns the text with what a terminal does not show as it is escaped as in
// a Go string: control characters, those that change the direction of the text, and
// bytes that are no UTF-8. A name in a bucket or a zip can hold them, and so can the
// answer of a server.
func visible(text string) string {
	var b strings.Builder
	for len(text) > 0 {
		r, size := utf8.DecodeRuneInString(text)
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, text[0])
		case strconv.IsGraphic(r):
			b.WriteRune(r)
		default:
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
		text = text[size:]
	}
	return b.String()
}
