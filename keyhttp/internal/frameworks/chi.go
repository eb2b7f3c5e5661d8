package frameworks

import (
	"encoding/json"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
)

// Chi takes both as they are.
func Chi(s Shop) http.Handler {
	r := chi.NewRouter()
	r.Use(middleware.Recoverer)
	r.Method(http.MethodPost, "/accounts/{account}/payments", s.Payments)
	r.With(s.Once).Post("/accounts/{account}/refunds", func(w http.ResponseWriter, r *http.Request) {
		id, err := s.Refund(chi.URLParam(r, "account"))
		if err != nil {
			http.Error(w, err.Error(), http.StatusPaymentRequired)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]string{"refund": id})
	})
	return r
}
