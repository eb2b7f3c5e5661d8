package frameworks

import (
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
)

// Mux needs the parameters handed on; chi and net/http's own ServeMux do it by themselves.
func Mux(s Shop) http.Handler {
	r := mux.NewRouter()
	r.Handle("/accounts/{account}/payments", muxParameters(s.Payments)).Methods(http.MethodPost)
	r.Handle("/accounts/{account}/refunds", s.Once(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := s.Refund(mux.Vars(r)["account"])
		if err != nil {
			http.Error(w, err.Error(), http.StatusPaymentRequired)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]string{"refund": id})
	}))).Methods(http.MethodPost)
	return r
}

// muxParameters makes the route's parameters those of net/http.
func muxParameters(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range mux.Vars(r) {
			r.SetPathValue(name, value)
		}
		h.ServeHTTP(w, r)
	})
}
