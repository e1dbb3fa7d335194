// Athensgcs shows what is in a bucket of Go modules, repairs what saves and
// deletes that were cut short left there, verifies the modules' checksums, deletes
// versions, and loads them from elsewhere.
//
//	athensgcs check  -bucket NAME
//	athensgcs repair -bucket NAME
//	athensgcs verify -bucket NAME
//	athensgcs show   -bucket NAME MODULE@VERSION...
//	athensgcs delete -bucket NAME MODULE@VERSION...
//	athensgcs load   -bucket NAME SOURCE
//
// Run athensgcs help for the exit statuses, and athensgcs COMMAND -h for the flags
// of a command, with examples.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"cloud.google.com/go/storage"
	"golang.org/x/term"

	"github.com/athensgcs/gcs"
)

// statuses is what help says about every command.
const statuses = `athensgcs COMMAND -h shows the flags of a command, its exit statuses, and examples.

Exit status:
    0  all is well
    1  something wrong was found
    2  not everything could be looked at or done: wrong flags, no such bucket or
       module, a missing permission, a failure on the way, an interrupt
`

// The exit statuses.
const (
	statusOK     = 0
	statusFound  = 1
	statusFailed = 2
)

func main() {
	p := newProgram(os.Stdout, os.Stderr)
	ctx, interrupt := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		interrupt()
		<-signals // does not wait
		p.temp.remove()
		os.Exit(statusFailed)
	}()
	os.Exit(p.run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	return newProgram(stdout, stderr).run(ctx, args)
}

func newProgram(stdout, stderr io.Writer) *program {
	f, ok := stderr.(*os.File)
	return &program{stdout: stdout, stderr: stderr, connect: connect, terminal: ok && term.IsTerminal(int(f.Fd()))}
}

// connect returns a client with application default credentials, or one of the
// emulator that the environment names.
func connect(ctx context.Context, grpc bool) (*storage.Client, error) {
	if grpc {
		return storage.NewGRPCClient(ctx)
	}
	return storage.NewClient(ctx)
}

// A program is one run of athensgcs.
type program struct {
	options
	stdout, stderr io.Writer
	connect        func(ctx context.Context, grpc bool) (*storage.Client, error)
	terminal       bool              // stderr is one
	transport      http.RoundTripper // to the checksum database; nil for the default

	args     []string // after the flags
	client   *storage.Client
	storage  *gcs.Storage
	progress *progress
	temp     tempDir
}

// A command is what the first argument names.
type command struct {
	name  string
	args  string // what follows the flags, "" for nothing; "..." at its end means several
	brief string // what it does, in a line
	usage string // what it does, and examples
	flags func(*program, *flag.FlagSet)
	// run returns the exit status, which an error makes statusFailed.
	run func(*program, context.Context) (int, error)
}

var commands = []*command{checkCommand, repairCommand, verifyCommand, showCommand, deleteCommand, loadCommand}

func (p *program) run(ctx context.Context, args []string) int {
	if len(args) == 0 {
		return p.fail("athensgcs", fmt.Errorf("the command is missing: %s; run athensgcs help", commandNames()))
	}
	name, args := args[0], args[1:]
	switch name {
	case "help", "-h", "-help", "--help":
		fmt.Fprint(p.stdout, help())
		return statusOK
	}
	i := slices.IndexFunc(commands, func(c *command) bool { return c.name == name })
	if i < 0 {
		return p.fail("athensgcs", fmt.Errorf("there is no command %q, but %s; run athensgcs help", name, commandNames()))
	}
	command := commands[i]
	flags := p.flags(command)
	err := p.parse(command, flags, args)
	if errors.Is(err, flag.ErrHelp) {
		flags.SetOutput(p.stdout)
		flags.Usage()
		return statusOK
	}
	if err != nil {
		return p.fail("athensgcs "+name, fmt.Errorf("%w; run athensgcs %s -h", err, name))
	}
	status, err := p.execute(ctx, command)
	if err != nil {
		return p.fail("athensgcs "+name, err)
	}
	return status
}

func commandNames() string {
	var names []string
	for _, c := range commands {
		names = append(names, c.name)
	}
	return strings.Join(names, ", ")
}

func help() string {
	var b strings.Builder
	b.WriteString("Athensgcs looks after a Cloud Storage bucket of Go modules.\n\n")
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	for _, c := range commands {
		fmt.Fprintf(w, "    %s\t%s\n", c.synopsis(), c.brief)
	}
	w.Flush()
	b.WriteString("\n" + statuses)
	return b.String()
}

func (c *command) synopsis() string {
	return strings.TrimSpace(fmt.Sprintf("athensgcs %-6s -bucket NAME [flags] %s", c.name, c.args))
}

func (p *program) fail(who string, err error) int {
	fmt.Fprintf(p.stderr, "%s: %s\n", who, visible(oneLine(err)))
	return statusFailed
}

func (p *program) execute(ctx context.Context, command *command) (int, error) {
	client, err := p.connect(ctx, p.grpc)
	if err != nil {
		return 0, fmt.Errorf("%w; for credentials run gcloud auth application-default login", err)
	}
	defer client.Close()
	p.client = client
	p.storage = p.newStorage(p.bucket, p.prefix)
	p.startProgress(0)
	defer func() { p.progress.done() }()
	defer p.temp.remove()
	status, err := command.run(p, ctx)
	switch {
	case err != nil && ctx.Err() != nil:
		return 0, errors.New("interrupted; run it again to see the rest")
	case gcs.Is(err, gcs.KindNotFound), errors.Is(err, storage.ErrBucketNotExist):
		return 0, fmt.Errorf("there is no bucket %s; look for its name with gcloud storage ls", p.bucket)
	}
	return status, err
}

func (p *program) newStorage(bucket, prefix string) *gcs.Storage {
	return gcs.NewStorage(p.client.Bucket(bucket), gcs.WithPrefix(prefix), gcs.WithStaleThreshold(time.Duration(p.stale)))
}

// startProgress starts the display of progress anew, with the bytes that are to pass if
// that is known.
func (p *program) startProgress(total int64) {
	if p.progress != nil {
		p.progress.done()
	}
	p.progress = &progress{}
	if p.terminal {
		p.progress = newProgress(p.stderr, total)
	}
}
