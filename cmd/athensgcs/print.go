package main

import (
	"encoding/json"
	"fmt"
	"strings"
)

// print prints a line of text, or with -json the value.
func (p *program) print(text string, value any) error {
	return p.progress.aside(func() error {
		if p.json {
			encoder := json.NewEncoder(p.stdout)
			encoder.SetEscapeHTML(false)
			return encoder.Encode(value)
		}
		_, err := fmt.Fprintln(p.stdout, text)
		return err
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
	failed := p.print(text, struct {
		Summary summary `json:"summary"`
		Stopped bool    `json:"stopped,omitempty"`
	}{s, err != nil})
	if err != nil {
		return err
	}
	return failed
}

// oneLine returns the message of an error without the line ends in it; answers of
// servers have some.
func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
