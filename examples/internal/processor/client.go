package processor

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
)

// A Client speaks to the processor.
type Client struct {
	URL  string
	HTTP http.Client
}

// A DeclinedError is the processor's word that it will not do what it was asked to, now or later.
type DeclinedError struct{ Reason string }

func (e *DeclinedError) Error() string { return "declined: " + e.Reason }

// Pay asks for a payout, and returns the processor's name for it. The error may be a [*DeclinedError]; any other leaves open
// whether it was made.
func (c *Client) Pay(ctx context.Context, token string, o Order) (payout string, err error) {
	done, err := c.post(ctx, "/payouts", token, o)
	return done.PayoutID, err
}

// Deliver asks for a receipt.
func (c *Client) Deliver(ctx context.Context, token string, o Order) (receipt string, err error) {
	done, err := c.post(ctx, "/receipts", token, o)
	return done.ReceiptID, err
}

func (c *Client) post(ctx context.Context, path, token string, o Order) (done confirmation, err error) {
	body, err := json.Marshal(o)
	if err != nil {
		return done, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.URL+path, bytes.NewReader(body))
	if err != nil {
		return done, err
	}
	req.Header.Set("Idempotency-Key", token)
	req.Header.Set("Content-Type", "application/json")
	req.GetBody = nil // or net/http, seeing the header, would send again by itself what no answer came to
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return done, err
	}
	defer resp.Body.Close()
	answer := json.NewDecoder(bufio.NewReader(resp.Body))
	if resp.StatusCode == http.StatusCreated {
		if err = answer.Decode(&done); err == nil && done == (confirmation{}) {
			err = errors.New("the processor's answer names nothing")
		}
		return done, err
	}
	var no refusal
	err = answer.Decode(&no)
	if resp.StatusCode == http.StatusPaymentRequired && err == nil {
		return done, &DeclinedError{no.Error}
	}
	return done, fmt.Errorf("the processor answers %s: %s", resp.Status, cmp.Or(no.Error, "no reason given"))
}

// Stats asks for the processor's own counts.
func (c *Client) Stats(ctx context.Context) (s Counts, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL+"/stats", nil)
	if err != nil {
		return s, err
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return s, err
	}
	defer resp.Body.Close()
	return s, json.NewDecoder(resp.Body).Decode(&s)
}
