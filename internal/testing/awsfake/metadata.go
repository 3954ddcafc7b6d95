package awsfake

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// containerRole is the role that the agent of ECS or EKS provides to a container
// (https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html).
type containerRole struct {
	arn           string // "" if there is none
	authorization string // required in requests
}

// instanceRole is the role that version 2 of the metadata service provides to an instance
// (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html).
type instanceRole struct {
	arn    string // "" if there is none
	name   string
	tokens map[string]time.Time // from session tokens to their expiry
}

// ContainerPath is the path of a container's credentials.
const ContainerPath = "/v2/credentials/b7a6"

// SetContainer sets the role of containers and the authorization that requests must have.
func (c *Cloud) SetContainer(roleARN, authorization string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.container = containerRole{roleARN, authorization}
	c.issued = append(c.issued, authorization)
}

// SetInstance sets the role of instances.
func (c *Cloud) SetInstance(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.instance.name, c.instance.arn = name, c.RoleARN(name)
}

// serveMetadata answers the requests of containers and instances.
func (c *Cloud) serveMetadata(w http.ResponseWriter, r *http.Request) {
	if !isLoopback(r) { // IMDS refuses proxied requests
		w.WriteHeader(http.StatusForbidden)
		return
	}
	switch fault := c.note("metadata " + r.Method + " " + r.URL.Path); fault {
	case Broken, Busy, Throttled, TooMany:
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	case Dropped, Lost:
		drop(w)
		return
	case Hanging, HangingLate:
		<-r.Context().Done()
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	const roles = "/latest/meta-data/iam/security-credentials/"
	switch r.URL.Path {
	case ContainerPath:
		c.serveContainer(w, r)
	case "/latest/api/token":
		seconds, err := strconv.Atoi(r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds"))
		if r.Method != http.MethodPut || err != nil || seconds < 1 || seconds > 21600 {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		token := "AQAE" + randomText() + "=="
		c.instance.tokens[token] = time.Now().Add(time.Duration(seconds) * time.Second)
		c.issued = append(c.issued, token)
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", strconv.Itoa(seconds))
		fmt.Fprint(w, token)
	case roles, roles + c.instance.name:
		switch {
		case r.Method != http.MethodGet || !time.Now().Before(c.instance.tokens[r.Header.Get("X-Aws-Ec2-Metadata-Token")]):
			w.WriteHeader(http.StatusUnauthorized) // version 1 is off
		case c.instance.arn == "":
			w.WriteHeader(http.StatusNotFound)
		case r.URL.Path == roles:
			fmt.Fprint(w, c.instance.name)
		default:
			made, _ := c.newSession(c.instance.arn, "i-0abcdef1234567890")
			answer(w, map[string]string{"Code": "Success", "LastUpdated": time.Now().UTC().Format(time.RFC3339), "Type": "AWS-HMAC",
				"AccessKeyId": made.AccessKeyID, "SecretAccessKey": made.SecretAccessKey, "Token": made.Token, "Expiration": made.Expiration})
		}
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (c *Cloud) serveContainer(w http.ResponseWriter, r *http.Request) {
	switch {
	case c.container.arn == "":
		w.WriteHeader(http.StatusNotFound)
	case r.Method != http.MethodGet || r.Header.Get("Authorization") != c.container.authorization:
		w.WriteHeader(http.StatusUnauthorized)
	default:
		made, _ := c.newSession(c.container.arn, "container")
		answer(w, made)
	}
}

func answer(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(value)
}
