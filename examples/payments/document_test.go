package main

import (
	"encoding/json"
	"maps"
	"mime"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// A document is what the tests read of openapi.json.
type document struct {
	OpenAPI string                          `json:"openapi"`
	Paths   map[string]map[string]operation `json:"paths"`

	Components struct {
		Headers   map[string]any      `json:"headers"`
		Responses map[string]response `json:"responses"`
		Schemas   map[string]schema   `json:"schemas"`
	} `json:"components"`
}

type operation struct {
	OperationID string              `json:"operationId"`
	Responses   map[string]response `json:"responses"`
}

type response struct {
	Ref     string `json:"$ref"`
	Headers map[string]struct {
		Required bool `json:"required"`
	} `json:"headers"`
	Content map[string]struct {
		Schema schema `json:"schema"`
	} `json:"content"`
}

type schema struct {
	Ref                  string            `json:"$ref"`
	Type                 string            `json:"type"`
	Enum                 []string          `json:"enum"`
	Required             []string          `json:"required"`
	Properties           map[string]schema `json:"properties"`
	AdditionalProperties *bool             `json:"additionalProperties"`
}

var readDocument = sync.OnceValues(func() (d document, err error) { return d, json.Unmarshal(openAPI, &d) })

// undocumented says what in an answer is not as the document has it. Places that there are none of, it does not know.
func undocumented(s *service, r *http.Request, w *httptest.ResponseRecorder) (faults []string) {
	doc, err := readDocument()
	if err != nil {
		return []string{err.Error()}
	}
	mux := http.NewServeMux()
	for _, route := range s.routes() {
		mux.Handle(route.method+" "+route.path, http.NotFoundHandler())
	}
	_, pattern := mux.Handler(r)
	if pattern == "" {
		return nil
	}
	method, path, _ := strings.Cut(pattern, " ")
	answer, ok := doc.Paths[path][strings.ToLower(method)].Responses[strconv.Itoa(w.Code)]
	if !ok {
		return []string{"the document has no answer " + strconv.Itoa(w.Code)}
	}
	if name, isRef := strings.CutPrefix(answer.Ref, "#/components/responses/"); isRef {
		answer = doc.Components.Responses[name]
	}
	kind, _, _ := mime.ParseMediaType(w.Header().Get("Content-Type"))
	content, ok := answer.Content[kind]
	if !ok {
		return []string{"the document has no " + kind + " for " + strconv.Itoa(w.Code)}
	}
	for _, name := range []string{"Location", "Retry-After", "Should-Retry", "Idempotency-Key", "Idempotent-Replayed", "WWW-Authenticate"} {
		if _, told := answer.Headers[name]; !told && w.Header().Get(name) != "" {
			faults = append(faults, "the document has no header "+name+" for "+strconv.Itoa(w.Code))
		}
	}
	for name, told := range answer.Headers {
		if told.Required && w.Header().Get(name) == "" {
			faults = append(faults, "the header "+name+" is missing with "+strconv.Itoa(w.Code))
		}
	}
	return append(faults, contradictions(doc, content.Schema, w.Body.Bytes())...)
}

// contradictions says what in an object is not as its schema has it.
func contradictions(doc document, s schema, text []byte) (faults []string) {
	if name, isRef := strings.CutPrefix(s.Ref, "#/components/schemas/"); isRef {
		s = doc.Components.Schemas[name]
	}
	var object map[string]any
	if err := json.Unmarshal(text, &object); err != nil {
		return []string{err.Error()}
	}
	for _, name := range s.Required {
		if _, ok := object[name]; !ok {
			faults = append(faults, "there is no "+name+" in "+string(text))
		}
	}
	closed := s.AdditionalProperties != nil && !*s.AdditionalProperties
	for name, value := range object {
		property, known := s.Properties[name]
		text, isText := value.(string)
		_, isNumber := value.(float64)
		switch {
		case !known && closed:
			faults = append(faults, "the document has no "+name)
		case known && (property.Type == "string" && !isText || property.Type == "integer" && !isNumber):
			faults = append(faults, name+" is no "+property.Type)
		case len(property.Enum) > 0 && !slices.Contains(property.Enum, text):
			faults = append(faults, name+" is "+text)
		}
	}
	return faults
}

func TestTheDocumentAndTheRoutesAreTheSame(t *testing.T) {
	doc, err := readDocument()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(doc.OpenAPI, "3.1.") {
		t.Errorf("it is OpenAPI %s", doc.OpenAPI)
	}
	var documented, routed []string
	names := map[string]bool{}
	for path, operations := range doc.Paths {
		for method, o := range operations {
			documented = append(documented, strings.ToUpper(method)+" "+path)
			if o.OperationID == "" || names[o.OperationID] {
				t.Errorf("%s %s has no name of its own", method, path)
			}
			names[o.OperationID] = true
		}
	}
	for _, r := range openBench(t, nil).routes() {
		routed = append(routed, r.method+" "+r.path)
	}
	slices.Sort(documented)
	slices.Sort(routed)
	if !slices.Equal(documented, routed) {
		t.Errorf("the document has %q, and there are %q", documented, routed)
	}
}

func TestTheDocumentRefersToNothingThatIsNotThere(t *testing.T) {
	var doc any
	if err := json.Unmarshal(openAPI, &doc); err != nil {
		t.Fatal(err)
	}
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, part := range v {
				walk(part)
			}
		case map[string]any:
			if ref, ok := v["$ref"].(string); ok && !resolves(doc, ref) {
				t.Errorf("there is no %s", ref)
			}
			for _, name := range slices.Sorted(maps.Keys(v)) {
				walk(v[name])
			}
		}
	}
	walk(doc)
}

func resolves(doc any, ref string) bool {
	path, ok := strings.CutPrefix(ref, "#/")
	for name := range strings.SplitSeq(path, "/") {
		m, isMap := doc.(map[string]any)
		if !isMap {
			return false
		}
		if doc, isMap = m[name]; !isMap {
			return false
		}
	}
	return ok
}
