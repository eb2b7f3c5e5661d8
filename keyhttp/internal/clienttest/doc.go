// Package clienttest asks keyhttp with the clients that people have: the Stripe library, curl, net/http alone and with
// keyhttp.Transport, and retryablehttp, over connections that break before a request arrives and after its work is done.
package clienttest
