package main

import (
	"context"
	"iter"

	"golang.org/x/sync/errgroup"
)

// maxPending is how many items inOrder is ahead of the oldest that is not done.
const maxPending = 1000

// inOrder calls work with each item, up to jobs at the same time, and report with each
// result, one at a time and in the order of the items. The first error of any of the
// three ends it. What is under way then still ends, and is reported if it succeeds and
// report is not what failed.
func inOrder[I, R any](ctx context.Context, jobs int, items func(context.Context) iter.Seq2[I, error],
	work func(context.Context, I) (R, error), report func(R) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(jobs + 1) // one reports
	pending := make(chan chan R, maxPending)
	group.Go(func() error {
		for result := range pending {
			if r, ok := <-result; ok {
				if err := report(r); err != nil {
					return err
				}
			}
		}
		return nil
	})
	begin := func(item I) error {
		result := make(chan R, 1)
		select {
		case pending <- result:
		case <-ctx.Done():
			return ctx.Err()
		}
		group.Go(func() error {
			defer close(result)
			r, err := work(ctx, item)
			if err == nil {
				result <- r
			}
			return err
		})
		return nil
	}
	var ended error
	for item, err := range items(ctx) {
		if err == nil {
			err = begin(item)
		}
		if err != nil {
			ended = err
			break
		}
	}
	close(pending)
	if err := group.Wait(); err != nil {
		return err // which ended the items too
	}
	return ended
}
