package targetconf

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"certctl-agent/internal/secret"
)

// overlays writes files, given as alternating names and contents.
func overlays(t *testing.T, files ...string) Overlays {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(files); i += 2 {
		if err := os.WriteFile(filepath.Join(dir, files[i]), []byte(files[i+1]), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Overlays{Dir: dir}
}

type sample struct {
	CertPath Path           `json:"cert_path" config:"required"`
	KeyPath  Path           `json:"key_path"`
	PEMPath  string         `json:"pem_path"`
	Password secret.String  `json:"password"`
	Port     int            `json:"port"`
	Enabled  bool           `json:"enabled"`
	Tags     map[string]int `json:"tags"`
	KeyFile  FileOptions    `json:"key_file_*" config:"secret"`
	CertFile FileOptions    `json:"cert_file_*"`
	Name     FileName       `json:"name"`
	Timeout  Duration       `json:"timeout"`
	Nested   struct {
		Endpoint string `json:"endpoint"`
		Attempts int    `json:"attempts"`
	} `json:"nested"`
	NotConfigured string
}

func decodeSample(t *testing.T, job string, o Overlays, resolvable ...string) (sample, *Config, error) {
	t.Helper()
	var s sample
	c, err := Merge(json.RawMessage(job), "NGINX", map[string]string{"combined_pem_path": "pem_path", "watch_dir": "cert_dir", "admin_url": "admin_api"}, "t-1", o)
	if err != nil {
		return s, nil, err
	}
	return s, c, c.Decode(&s, resolvable...)
}

func TestLayers(t *testing.T) {
	const mask = `"********"`
	tests := []struct {
		name      string
		job       string
		overlays  []string
		cert, key string
	}{
		{"the job alone", `{"cert_path":"/c","key_path":"/k"}`, nil, "/c", "/k"},
		{"default over job", `{"cert_path":"/c","key_path":"/k"}`, []string{"default.json", `{"key_path":"/d"}`}, "/c", "/d"},
		{"own over default", `{"cert_path":"/c"}`, []string{"default.json", `{"key_path":"/d"}`, "t-1.json", `{"key_path":"/o"}`}, "/c", "/o"},
		{"another target's", `{"cert_path":"/c","key_path":"/k"}`, []string{"t-2.json", `{"key_path":"/o"}`}, "/c", "/k"},
		{"the mask is not a value", `{"cert_path":"/c","key_path":` + mask + `}`, []string{"default.json", `{"key_path":"/d"}`}, "/c", "/d"},
		{"upper case", `{"CERT_PATH":"/c","Key_Path":"/k"}`, []string{"t-1.json", `{"kEY_pATH":"/o"}`}, "/c", "/o"},
		{"look-alikes in the job do not slip past", "{\"cert_path\":\"/c\",\"\u212aey_path\":\"/evil\"}", []string{"t-1.json", `{"key_path":"/o"}`}, "/c", "/o"},
		{"nor escaped ones", `{"cert_path":"/c","\u212aey_path":"/evil"}`, []string{"t-1.json", `{"key_path":"/o"}`}, "/c", "/o"},
		{"twice in one object: the last", `{"cert_path":"/c","key_path":"/1","KEY_PATH":"/2"}`, nil, "/c", "/2"},
		{"null is not a value", `{"cert_path":"/c","key_path":"/k"}`, []string{"t-1.json", `{"key_path":null}`}, "/c", "/k"},
		{"an overlay can clear a key of the job", `{"cert_path":"/c","key_path":"/k"}`, []string{"t-1.json", `{"key_path":""}`}, "/c", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, _, err := decodeSample(t, test.job, overlays(t, test.overlays...))
			if err != nil {
				t.Fatal(err)
			}
			if string(got.CertPath) != test.cert || string(got.KeyPath) != test.key {
				t.Errorf("got %q and %q, want %q and %q", got.CertPath, got.KeyPath, test.cert, test.key)
			}
		})
	}
}

func TestAliases(t *testing.T) {
	tests := []struct{ job, overlay, want string }{
		{`{"combined_pem_path":"/a"}`, `{}`, "/a"},
		{`{"combined_pem_path":"/a"}`, `{"pem_path":"/o"}`, "/o"},
		{`{"pem_path":"/a"}`, `{"Combined_PEM_Path":"/o"}`, "/o"},
		{`{"pem_path":"/main","combined_pem_path":"/a"}`, `{}`, "/main"},
		{`{"combined_pem_path":"/a","pem_path":"/main"}`, `{}`, "/main"},
		{`{"pem_path":"","combined_pem_path":"/a"}`, `{}`, "/a"},
		{`{"combined_pem_path":"/a","pem_path":""}`, `{}`, "/a"},
	}
	for _, test := range tests {
		job := strings.Replace(test.job, "{", `{"cert_path":"/c",`, 1)
		got, _, err := decodeSample(t, job, overlays(t, "t-1.json", test.overlay))
		if err != nil || got.PEMPath != test.want {
			t.Errorf("%s under %s: got %q, %v, want %q", test.job, test.overlay, got.PEMPath, err, test.want)
		}
	}
}

func TestMasked(t *testing.T) {
	o := overlays(t)
	_, _, err := decodeSample(t, `{"cert_path":"/c","key_path":"********"}`, o)
	if err == nil || !strings.Contains(err.Error(), "key_path") || !strings.Contains(err.Error(), filepath.Join(o.Dir, "t-1.json")) {
		t.Errorf("a masked path: got %v, want the key and the overlay's name", err)
	}
	got, c, err := decodeSample(t, `{"cert_path":"/c","key_path":"********"}`, o, "key_path")
	if err != nil || got.KeyPath != "" || !c.Masked("key_path") {
		t.Errorf("a resolvable one: got %q, %v, want none and Masked", got.KeyPath, err)
	}
	for _, key := range []string{"password", "key_file_owner", "key_file_group"} {
		_, _, err := decodeSample(t, `{"cert_path":"/c","`+key+`":"*********"}`, o, "key_path")
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("masked %s: got %v", key, err)
		}
	}
	if _, _, err := decodeSample(t, `{"cert_path":"/c","private_thing":"********"}`, Overlays{}); err != nil {
		t.Errorf("a masked key without a field: %v", err)
	}
	_, c, err = decodeSample(t, `{"cert_path":"/c","key_path":"********"}`, overlays(t, "default.json", `{"key_path":"/d"}`))
	if err != nil || c.Masked("key_path") || !c.Local("key_path") || c.Local("cert_path") {
		t.Errorf("supplied by an overlay: masked %v, local %v, %v", c.Masked("key_path"), c.Local("key_path"), err)
	}
	if _, _, err := decodeSample(t, `{"cert_path":"********"}`, Overlays{Dir: "/no/such"}); err == nil || !strings.Contains(err.Error(), "/no/such/t-1.json") {
		t.Errorf("without overlays: got %v, want the setting named", err)
	}
}

func TestTypePin(t *testing.T) {
	const job = `{"cert_path":"/c","target_type":"SSH"}`
	if _, _, err := decodeSample(t, job, overlays(t, "t-1.json", `{"target_type":"NGINX"}`)); err != nil {
		t.Errorf("the pinned type: %v", err)
	}
	if _, _, err := decodeSample(t, job, overlays(t)); err != nil {
		t.Errorf("a pin of the job's own: %v, want it ignored", err)
	}
	_, _, err := decodeSample(t, job, overlays(t, "t-1.json", `{"Target_Type":"Postfix"}`))
	if err == nil || !strings.Contains(err.Error(), "Postfix") || !strings.Contains(err.Error(), "NGINX") {
		t.Errorf("another type: got %v", err)
	}
	if _, _, err := decodeSample(t, job, overlays(t, "default.json", `{"target_type":7}`)); err == nil {
		t.Error("a pin that is not a string: got no error")
	}
}

// Settings have the source of each value and no secrets.
func TestSettings(t *testing.T) {
	var s struct {
		Path     Path          `json:"cert_path"`
		Name     FileName      `json:"name" default:"cert.pem"`
		Other    FileName      `json:"other" default:"key.pem"`
		Password secret.String `json:"password"`
		Unset    string        `json:"unset"`
		Masked   Path          `json:"key_path" default:"/k"`
	}
	o := overlays(t, "t-1.json", `{"password":"hunter2","post_deploy_verify":{"timeout":"5s"}}`)
	c, err := Merge([]byte(`{"path_alias":"/a","name":"x","password":"********","key_path":"********","command_timeout":0}`),
		"NGINX", map[string]string{"path_alias": "cert_path"}, "t-1", o)
	must(t, err)
	must(t, c.Decode(&s, "key_path"))
	if s.Name != "x" || s.Other != "key.pem" || s.Password.Reveal() != "hunter2" || s.Masked != "" {
		t.Errorf("decoded %+v", s)
	}
	overlay := filepath.Join(o.Dir, "t-1.json")
	want := map[string]Setting{
		"cert_path": {"cert_path", `"/a"`, "job"}, "name": {"name", `"x"`, "job"}, "other": {"other", `"key.pem"`, "default"},
		"password": {"password", `"[redacted]"`, overlay}, "post_deploy_verify.timeout": {"post_deploy_verify.timeout", `"5s"`, overlay},
		"command_timeout": {"command_timeout", `"1m"`, "default"},
	}
	for _, got := range c.Settings() {
		if is, ok := want[got.Key]; ok && is != got {
			t.Errorf("got %+v, want %+v", got, is)
		}
		delete(want, got.Key)
		if got.Key == "unset" || got.Key == "key_path" || strings.Contains(got.Value, "hunter2") {
			t.Errorf("got %+v", got)
		}
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
}

func TestDecode(t *testing.T) {
	got, c, err := decodeSample(t, `{"cert_path":"/a//b/c","port":"8443","enabled":"Yes","tags":{"x":1},"password":"hunter2",
		"key_file_mode":"0640","key_file_owner":33,"key_file_group":"ssl-cert","cert_file_mode":416,"name":"cert.pem","timeout":"10s",
		"nested":{"Endpoint":"h:1","attempts":"5","more":1},"zebra":1,"ant":2}`, Overlays{})
	if err != nil {
		t.Fatal(err)
	}
	if got.CertPath != "/a/b/c" || got.Port != 8443 || !got.Enabled || got.Tags["x"] != 1 || got.Password.Reveal() != "hunter2" || got.Name != "cert.pem" ||
		got.Timeout != Duration(10*time.Second) || got.Nested.Endpoint != "h:1" || got.Nested.Attempts != 5 {
		t.Errorf("got %+v", got)
	}
	if want := (FileOptions{Mode: 0o640, Owner: "33", Group: "ssl-cert"}); got.KeyFile != want {
		t.Errorf("key file: got %+v, want %+v", got.KeyFile, want)
	}
	if unknown := c.Unknown(); !slices.Equal(unknown, []string{"ant", "zebra"}) {
		t.Errorf("unknown keys: got %q", unknown)
	}
}

// Every error names its key and what was expected, and shows no value that could be a secret.
func TestMistakes(t *testing.T) {
	tests := []struct{ config, key, says string }{
		{`[]`, "target config", "expected a JSON object, got a list"},
		{`null`, "target config", "expected a JSON object, got null"},
		{`"x"`, "target config", "got a string"},
		{`{"a":1} {}`, "target config", "after top-level value"},
		{`{"a":`, "target config", "unexpected end"},
		{`{}`, "cert_path", "is required"},
		{`{"cert_path":""}`, "cert_path", "is required"},
		{`{"cert_path":5}`, "cert_path", "expected an absolute path, got a number"},
		{`{"cert_path":"etc/x"}`, "cert_path", "absolute"},
		{`{"cert_path":"/etc/../x"}`, "cert_path", `".."`},
		{`{"cert_path":"/etc/\u0000x"}`, "cert_path", "absolute"},
		{`{"cert_path":"/c","pem_path":{}}`, "pem_path", "expected a string, got an object"},
		{`{"cert_path":"/c","password":["hunter2"]}`, "password", "expected a string, got a list"},
		{`{"cert_path":"/c","port":"abc"}`, "port", `expected a whole number, got "abc"`},
		{`{"cert_path":"/c","port":1.5}`, "port", "expected a whole number, got 1.5"},
		{`{"cert_path":"/c","port":[1]}`, "port", "got a list"},
		{`{"cert_path":"/c","enabled":"maybe"}`, "enabled", "expected true or false"},
		{`{"cert_path":"/c","tags":5}`, "tags", "got a number"},
		{`{"cert_path":"/c","nested":"x"}`, "nested", "expected a JSON object"},
		{`{"cert_path":"/c","nested":{"attempts":true}}`, "nested.attempts", "whole number"},
		{`{"cert_path":"/c","key_file_mode":640}`, "key_file_mode", `"0640" was probably meant (416`},
		{`{"cert_path":"/c","key_file_mode":"0644"}`, "key_file_mode", "0770"},
		{`{"cert_path":"/c","key_file_owner":"a b"}`, "key_file_owner", "account"},
		{`{"cert_path":"/c","key_file_owner":true}`, "key_file_owner", "account"},
		{`{"cert_path":"/c","timeout":10}`, "timeout", `"10s" was probably meant`},
		{`{"cert_path":"/c","name":"../x"}`, "name", "plain file name"},
		{`{"cert_path":"/c","name":7}`, "name", "plain file name"},
	}
	for _, test := range tests {
		_, _, err := decodeSample(t, test.config, Overlays{})
		if test.says == "plain file name" && err != nil && strings.Contains(err.Error(), "expected a file name") {
			continue
		}
		if err == nil || !strings.Contains(err.Error(), test.key) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %q and %q in it", test.config, err, test.key, test.says)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error shows a secret: %v", test.config, err)
		}
	}
	if c, err := Merge(nil, "NGINX", nil, "x", Overlays{}); err != nil || c.Decode(&struct{}{}) != nil {
		t.Errorf("no config at all: %v", err)
	}
	if c, err := Merge(nil, "NGINX", nil, "default", overlays(t, "default.json", `{"port":1}`)); err != nil || !c.Local("port") {
		t.Errorf("a target called default: %v", err)
	}
}

// FuzzParseObject compares the folding of keys with encoding/json: an overlay must override every
// spelling that encoding/json accepts for key_path.
func FuzzParseObject(f *testing.F) {
	for _, seed := range []string{`{"key_path":"/a"}`, "{\"\u212aey_path\":\"/a\"}", `{"KEY_PATH":"/a","key_path":"/b"}`, `{"key_path":null}`, `{"a":{"b":[1,2]}}`,
		`{"\u212aey_path":"x"}`, `{"key_path":1}`, `[]`, `{"hoſt":"x"}`, "{\"key_path\":\"\xff\"}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var want struct {
			Key  string `json:"key_path"`
			Host string `json:"host"`
		}
		if json.Unmarshal(data, &want) != nil {
			_, _ = new(Config).parseObject(data)
			return
		}
		values, err := new(Config).parseObject(data)
		if err != nil {
			if string(data[0]) == "n" {
				return // null is not an object here
			}
			var object map[string]any
			if json.Unmarshal(data, &object) == nil {
				t.Fatalf("%q: %v", data, err)
			}
			return
		}
		c := &Config{values: values, settings: make(map[string]Setting)}
		var got struct {
			Key  string `json:"key_path"`
			Host string `json:"host"`
		}
		if err := c.Decode(&got); err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		if got.Key != want.Key || got.Host != want.Host {
			t.Errorf("%q: got %+v, encoding/json says %+v", data, got, want)
		}
	})
}

func ExampleConfig_Decode() {
	c, _ := Merge(json.RawMessage(`{"cert_path": "/etc/nginx/tls/cert.pem", "cert_file_mode": 640}`), "NGINX", nil, "web", Overlays{})
	var config struct {
		CertPath Path        `json:"cert_path" config:"required"`
		CertFile FileOptions `json:"cert_file_*"`
	}
	fmt.Println(c.Decode(&config))
	// Output: target config: cert_file_mode: a number is the bits in decimal, and 640 is 01200, which is not a plausible file mode, so "0640" was probably meant (416 as a number)
}

// TestSecretFile covers secrets that an overlay reads from a file.
func TestSecretFile(t *testing.T) {
	dir := t.TempDir()
	file := func(name, data string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, []byte(data), 0o600))
		must(t, os.Chmod(path, mode))
		return path
	}
	good := file("good", "hunter2 \n", 0o600)
	type config struct {
		Password secret.String `json:"password" config:"required"`
		Nested   struct {
			Token secret.String `json:"token"`
		} `json:"nested"`
	}
	decode := func(job, overlay string) (config, *Config, error) {
		var got config
		c, err := Merge([]byte(job), "SSH", nil, "t-1", overlays(t, "t-1.json", overlay))
		must(t, err)
		return got, c, c.Decode(&got)
	}
	for _, job := range []string{`{}`, `{"password":"********"}`, `{"password":"of the job"}`} {
		var got config
		c, err := Merge([]byte(job), "SSH", nil, "t-1", overlays(t, "t-1.json", `{"password_file":"`+good+`","nested":{"token_file":"`+good+`"}}`))
		must(t, err)
		for range 2 {
			if err := c.Decode(&got); err != nil || got.Password.Reveal() != "hunter2 " || got.Nested.Token.Reveal() != "hunter2 " {
				t.Errorf("%s: got %q and %q, %v", job, got.Password.Reveal(), got.Nested.Token.Reveal(), err)
			}
		}
		if c.Masked("password") || len(c.Unknown()) > 0 {
			t.Errorf("%s: masked %t, unknown %q", job, c.Masked("password"), c.Unknown())
		}
		for _, s := range c.Settings() {
			if s.Key == "password" && (s.Value != `"[redacted]"` || !strings.HasSuffix(s.Source, "t-1.json")) {
				t.Errorf("%s: setting %+v", job, s)
			}
		}
	}
	for _, test := range []struct{ name, job, overlay, want string }{
		{"of the job", `{"password":"x","password_file":"` + good + `"}`, `{}`, "password_file: a job must not name a file"},
		{"nested, of the job", `{"password":"x","nested":{"token_file":"` + good + `"}}`, `{}`, "nested.token_file: a job must not name a file"},
		{"beside the secret", `{}`, `{"password":"x","password_file":"` + good + `"}`, "remove one of the two"},
		{"relative", `{}`, `{"password_file":"good"}`, "expected an absolute path"},
		{"not a string", `{}`, `{"password_file":["` + good + `"]}`, "expected an absolute path"},
		{"missing", `{}`, `{"password_file":"` + dir + `/none"}`, "no such file"},
		{"empty", `{}`, `{"password_file":"` + file("empty", "\n", 0o600) + `"}`, "is empty"},
		{"open to others", `{}`, `{"password_file":"` + file("open", "hunter2", 0o644) + `"}`, "can be read by others"},
		{"too long", `{}`, `{"password_file":"` + file("long", strings.Repeat("x", maxSecret+1), 0o600) + `"}`, "is longer than"},
	} {
		_, _, err := decode(test.job, test.overlay)
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: error %v, want one with %q", test.name, err, test.want)
		}
	}
}

// TestTrueByDefault covers pointers to booleans, which distinguish false from not configured.
func TestTrueByDefault(t *testing.T) {
	for config, want := range map[string]bool{
		`{}`: true, `{"create":""}`: true, `{"create":true}`: true, `{"create":"on"}`: true, `{"create":false}`: false, `{"create":"no"}`: false,
	} {
		var got struct {
			Create *bool `json:"create" default:"true"`
		}
		c, err := Merge(json.RawMessage(config), "NGINX", nil, "t-1", Overlays{})
		if err == nil {
			err = c.Decode(&got)
		}
		if err != nil || got.Create == nil || *got.Create != want {
			t.Errorf("%s: got %v, %v, want %v", config, got.Create, err, want)
		}
	}
	c, err := Merge(json.RawMessage(`{"create":[]}`), "NGINX", nil, "t-1", Overlays{})
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Create *bool `json:"create"`
	}
	if err := c.Decode(&got); err == nil || !strings.Contains(err.Error(), "create: expected true or false") {
		t.Errorf("a list: %v", err)
	}
}
