package windows

import (
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"time"

	"certctl-agent/internal/connector"
	"certctl-agent/internal/keyentry"
	"certctl-agent/internal/pemutil"
	"certctl-agent/internal/pkcs12"
)

// newPFX returns a PKCS#12 with the key and its certificate, and its one-time password. Windows
// uses name as the friendly name.
func newPFX(m *connector.Material, name string, legacy bool) (pfx []byte, password string, err error) {
	key, err := pemutil.ParseKey(m.KeyPEM)
	if err != nil {
		return nil, "", fmt.Errorf("the private key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, "", fmt.Errorf("the private key: %w", err)
	}
	defer clear(der)
	password = rand.Text()
	store := pkcs12.NewOnce(password, legacy)
	entry := keyentry.PrivateKey{Alias: name, PKCS8: der, Chain: []*x509.Certificate{m.Leaf}, Created: time.Now(), Password: password}
	if _, err := store.Put(entry, legacy); err != nil {
		return nil, "", err
	}
	pfx, err = store.Encode()
	return pfx, password, err
}
