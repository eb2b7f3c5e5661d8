package frameworks

import (
	"bufio"
	"io"
	"net"
	"net/http"

	"github.com/gin-gonic/gin"
)

// Gin needs an adapter for each: gin.WrapH keeps the parameters to itself, and there is none for middleware of net/http.
func Gin(s Shop) http.Handler {
	e := gin.New()
	e.Use(gin.RecoveryWithWriter(io.Discard))
	e.POST("/accounts/:account/payments", ginHandler(s.Payments))
	e.POST("/accounts/:account/refunds", ginMiddleware(s.Once), func(c *gin.Context) {
		id, err := s.Refund(c.Param("account"))
		if err != nil {
			c.AbortWithStatusJSON(http.StatusPaymentRequired, gin.H{"error": err.Error()})
			return
		}
		c.JSON(http.StatusOK, gin.H{"refund": id})
	})
	return e
}

// ginHandler makes the route's parameters those of net/http.
func ginHandler(h http.Handler) gin.HandlerFunc {
	return func(c *gin.Context) {
		for _, p := range c.Params {
			c.Request.SetPathValue(p.Key, p.Value)
		}
		h.ServeHTTP(c.Writer, c.Request)
	}
}

// ginMiddleware ends gin's chain of handlers, which would run the next one after a replay as well.
func ginMiddleware(once func(http.Handler) http.Handler) gin.HandlerFunc {
	return func(c *gin.Context) {
		request, writer := c.Request, c.Writer
		defer func() { c.Request, c.Writer = request, writer }()
		once(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c.Request, c.Writer = r, &ginWriter{ResponseWriter: w, status: http.StatusOK, size: -1}
			c.Next()
			c.Writer.WriteHeaderNow()
		})).ServeHTTP(writer, request)
		c.Abort()
	}
}

// ginWriter is the writer that keyhttp gives to a handler, with what gin's handlers expect of one: the status can be changed
// until the first byte of the body.
type ginWriter struct {
	http.ResponseWriter
	status, size int // size: -1 until the header is written
}

func (w *ginWriter) WriteHeader(status int) {
	if status > 0 && !w.Written() {
		w.status = status
	}
}

func (w *ginWriter) WriteHeaderNow() {
	if !w.Written() {
		w.size = 0
		w.ResponseWriter.WriteHeader(w.status)
	}
}

func (w *ginWriter) Write(b []byte) (int, error) {
	w.WriteHeaderNow()
	n, err := w.ResponseWriter.Write(b)
	w.size += n
	return n, err
}

func (w *ginWriter) WriteString(s string) (int, error) { return w.Write([]byte(s)) }
func (w *ginWriter) Status() int                       { return w.status }
func (w *ginWriter) Size() int                         { return w.size }
func (w *ginWriter) Written() bool                     { return w.size >= 0 }
func (w *ginWriter) Unwrap() http.ResponseWriter       { return w.ResponseWriter }

func (w *ginWriter) Flush() {
	w.WriteHeaderNow()
	http.NewResponseController(w.ResponseWriter).Flush()
}

func (w *ginWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return http.NewResponseController(w.ResponseWriter).Hijack()
}

// CloseNotify is never told anything: a protected handler goes on when its client goes away.
func (w *ginWriter) CloseNotify() <-chan bool { return nil }

func (w *ginWriter) Pusher() http.Pusher {
	p, _ := w.ResponseWriter.(http.Pusher)
	return p
}
