package netfault

import (
	"io"
	"net"
	"net/http"
	"sync"
)

// Tunnel returns an HTTP proxy that only supports CONNECT (RFC 9110, section 9.3.6). It connects a
// client to the address that route returns for the requested one.
func Tunnel(route func(address string) string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			http.Error(w, "only CONNECT", http.StatusMethodNotAllowed)
			return
		}
		server, err := net.Dial("tcp", route(r.Host))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer server.Close()
		w.WriteHeader(http.StatusOK)
		client, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer client.Close()
		var answers sync.WaitGroup
		answers.Go(func() { _, _ = io.Copy(client, server); client.Close() })
		_, _ = io.Copy(server, buffered)
		server.Close()
		answers.Wait()
	})
}
