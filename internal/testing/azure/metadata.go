package azure

import (
	"fmt"
	"net/http"
	"slices"
	"time"
)

// serveMetadata answers requests to the metadata service of a virtual machine, see
// https://learn.microsoft.com/entra/identity/managed-identities-azure-resources/how-to-use-vm-token#get-a-token-using-http,
// and to the token endpoint of App Service, see
// https://learn.microsoft.com/azure/app-service/overview-managed-identity#rest-endpoint-reference.
func (s *Server) serveMetadata(w http.ResponseWriter, r *http.Request) {
	refuse := func(status int, code, words string) {
		answer(w, status, map[string]any{"error": code, "error_description": words})
	}
	operation := map[string]string{"/metadata/identity/oauth2/token": "imds", "/msi/token": "app"}[r.URL.Path]
	if operation == "" || r.Method != http.MethodGet {
		http.NotFound(w, r)
		return
	}
	proceed, instead := s.begin(w, r, operation, "")
	if !proceed {
		return
	}
	query := r.URL.Query()
	resource, client := query.Get("resource"), query.Get("client_id")
	s.mu.Lock()
	assigned := s.identities[client]
	s.mu.Unlock()
	known := slices.ContainsFunc(clouds(), func(c Cloud) bool { return c.Resource() == resource })
	switch {
	case operation == "imds" && r.Header.Get("Metadata") != "true":
		refuse(http.StatusBadRequest, "invalid_request", "Required metadata header not specified")
	case operation == "imds" && r.Header.Get("X-Forwarded-For") != "":
		refuse(http.StatusForbidden, "invalid_request", "Requests that were forwarded are refused")
	case operation == "imds" && query.Get("api-version") != "2018-02-01",
		operation == "app" && query.Get("api-version") != "2019-08-01":
		refuse(http.StatusBadRequest, "bad_request_102", "Required api-version is missing or not supported")
	case operation == "app" && r.Header.Get("X-IDENTITY-HEADER") != s.AppHeader:
		refuse(http.StatusUnauthorized, "unauthorized", "the header X-IDENTITY-HEADER is missing or wrong")
	case !known:
		refuse(http.StatusBadRequest, "invalid_resource", "AADSTS500011: The resource principal named "+resource+" was not found")
	case !assigned:
		refuse(http.StatusBadRequest, "invalid_request", "Identity not found")
	default:
		value, life := s.Issue(resource)
		if instead != nil {
			instead()
			return
		}
		said := map[string]any{ // numbers are strings here
			"access_token": value, "expires_on": fmt.Sprint(time.Now().Add(life).Unix()), "resource": resource, "token_type": "Bearer", "client_id": client,
		}
		if operation == "imds" {
			said["expires_in"], said["not_before"], said["ext_expires_in"] = fmt.Sprint(int(life.Seconds())), fmt.Sprint(time.Now().Unix()), fmt.Sprint(int(life.Seconds()))
		}
		answer(w, http.StatusOK, said)
	}
}
