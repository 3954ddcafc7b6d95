package target

import (
	"time"
)

// Common is the part of a target's configuration that all types share.
type Common struct {
	Host     string `json:"host"`
	Hostname string `json:"hostname"`
	Target   string `json:"target"`
	Address  string `json:"address"`
	Port     int    `json:"port"`

	Check           VerifyOptions `json:"post_deploy_verify"`
	CheckAttempts   int           `json:"post_deploy_verify_attempts"`
	CheckBackoff    Duration      `json:"post_deploy_verify_backoff"`
	CheckMaxBackoff Duration      `json:"post_deploy_verify_max_backoff"`

	CommandTimeout Duration `json:"command_timeout"`
	Retention      int      `json:"backup_retention"`
	DropRoot       bool     `json:"drop_root"`
}

// VerifyOptions is the check that is part of the transaction.
type VerifyOptions struct {
	Enabled    bool     `json:"enabled"`
	Endpoint   string   `json:"endpoint"` // host:port
	Timeout    Duration `json:"timeout"`
	ServerName string   `json:"server_name"`
	StartTLS   string   `json:"starttls"` // smtp, imap, pop3
}

// Defaults and bounds.
const (
	defaultCommandTimeout = time.Minute
	defaultVerifyTimeout  = 10 * time.Second
	defaultAttempts       = 3
	defaultBackoff        = time.Second
	defaultMaxBackoff     = 16 * time.Second
	maxAttempts           = 100
	maxRetention          = 1000
)

// DecodeCommon takes the keys that all types share.
func DecodeCommon(c *Config) (Common, error) {
	var common Common
	if err := c.Decode(&common); err != nil {
		return Common{}, err
	}
	return common, common.check()
}

func (c *Common) check() error {
	switch {
	case c.Port < 0 || c.Port > 65535:
		return Invalid("port", "expected 1 to 65535, got %d", c.Port)
	case c.CheckAttempts < 0 || c.CheckAttempts > maxAttempts:
		return Invalid("post_deploy_verify_attempts", "expected 1 to %d, got %d", maxAttempts, c.CheckAttempts)
	case c.Retention < -1 || c.Retention > maxRetention:
		return Invalid("backup_retention", "expected -1 (none), 0 (the default) or up to %d, got %d", maxRetention, c.Retention)
	}
	c.CommandTimeout = Duration(c.CommandTimeout.Or(defaultCommandTimeout))
	return nil
}
