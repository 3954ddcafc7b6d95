package bigip

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"certctl-agent/internal/pemutil"
)

const (
	sslCert = "ssl-cert"
	sslKey  = "ssl-key"

	// MaxChunk bounds one request of an upload, in bytes.
	MaxChunk = 512 << 10
)

// part is an incomplete upload.
type part struct {
	data []byte
	size int
}

// upload accepts a chunk
// (https://community.f5.com/kb/technicalarticles/demystifying-icontrol-rest-part-5-transferring-files/286689).
func (d *Device) upload(r *http.Request, name string, body []byte) (object, error) {
	var start, end, size int
	switch {
	case r.Method != http.MethodPost:
		return nil, refuse(405, "method %s is not supported", r.Method)
	case name == "" || strings.ContainsAny(name, "/ ") || strings.HasPrefix(name, "."):
		return nil, refuse(400, "bad file name")
	case r.Header.Get("Content-Type") != "application/octet-stream":
		return nil, refuse(415, "content type %s is not supported", r.Header.Get("Content-Type"))
	case len(body) > MaxChunk:
		return nil, refuse(400, "chunk byte count %d exceeds %d", len(body), MaxChunk)
	}
	_, err := fmt.Sscanf(r.Header.Get("Content-Range"), "%d-%d/%d", &start, &end, &size)
	p := d.parts[name]
	if start == 0 {
		p = &part{size: size}
	}
	switch {
	case err != nil || fmt.Sprintf("%d-%d/%d", start, end, size) != r.Header.Get("Content-Range"):
		return nil, refuse(400, "bad Content-Range header %q", r.Header.Get("Content-Range"))
	case end-start+1 != len(body):
		return nil, refuse(400, "Chunk byte count %d in Content-Range header different from received buffer length %d", end-start+1, len(body))
	case p == nil || p.size != size || start != len(p.data) || end >= size:
		return nil, refuse(400, "chunk %d-%d/%d does not follow what is there", start, end, size)
	}
	p.data = append(p.data, body...)
	d.parts[name] = p
	if len(p.data) == size {
		delete(d.parts, name)
		d.uploads[name] = p.data
	}
	return object{"remainingByteCount": size - len(p.data), "usedChunks": object{"0": len(p.data)}, "totalByteCount": size,
		"localFilePath": Downloads + name, "temporaryFilePath": Downloads + "tmp/" + name, "generation": 0}, nil
}

// remove implements unix-rm, which only administrators may run.
func (d *Device) remove(sent object) (object, error) {
	name, ok := strings.CutPrefix(text(sent["utilCmdArgs"]), Downloads)
	if text(sent["command"]) != "run" || !ok || strings.ContainsAny(name, "/ *") {
		return nil, refuse(400, "bad command")
	}
	answer := object{"kind": "tm:util:unix-rm:runstate", "command": "run", "utilCmdArgs": sent["utilCmdArgs"]}
	if d.removeFails != "" {
		answer["commandResult"] = "/bin/rm: cannot remove '" + Downloads + name + "': " + d.removeFails + "\n"
		return answer, nil
	}
	if _, ok := d.uploads[name]; !ok {
		answer["commandResult"] = "/bin/rm: cannot remove '" + Downloads + name + "': No such file or directory\n"
	}
	delete(d.uploads, name)
	return answer, nil
}

// file is a file with certificates or a key.
type file struct {
	Content  []byte
	Source   string
	Created  time.Time
	Revision int64

	leaf    *x509.Certificate // first certificate, or nil
	private crypto.Signer     // or nil
}

// parsed parses the contents of a file.
func parsed(f *file) *file {
	if certificates, err := pemutil.ParseCertificates(f.Content); err == nil {
		f.leaf = certificates[0]
	}
	if key, err := pemutil.ParseKey(f.Content); err == nil {
		f.private = key
	}
	return f
}

func (d *Device) newFile(content []byte, source string) *file {
	d.count++
	return parsed(&file{Content: content, Source: source, Created: d.tick(), Revision: d.count})
}

var kindNames = map[string]string{sslCert: "Certificate File", sslKey: "Certificate Key File"}

func (c *config) files(kind string) map[string]*file {
	if kind == sslKey {
		return c.Keys
	}
	return c.Certs
}

func (d *Device) file(c *config, kind, method, rest, filter string, sent object) (object, error) {
	files := c.files(kind)
	if rest == "" {
		switch method {
		case http.MethodGet:
			return d.listFiles(kind, files, filter)
		case http.MethodPost:
			path, err := c.newPath(sent)
			if err != nil {
				return nil, err
			}
			if files[path] != nil {
				return nil, refuse(409, "01020066:3: The requested %s (%s) already exists in partition %s.", kindNames[kind], path, partitionOf(path))
			}
			return d.setFile(files, kind, path, sent)
		}
		return nil, refuse(405, "method %s is not supported", method)
	}
	path := fromURL(rest)
	if !strings.HasPrefix(path, "/") {
		path = "/Common/" + path
	}
	if files[path] == nil {
		return nil, notFound(kindNames[kind], path)
	}
	switch method {
	case http.MethodGet:
		return d.showFile(kind, path, files[path]), nil
	case http.MethodPut, http.MethodPatch:
		if sent["sourcePath"] == nil { // Ansible's second request for a certificate
			return d.showFile(kind, path, files[path]), nil
		}
		return d.setFile(files, kind, path, sent)
	case http.MethodDelete:
		if c.uses(path) {
			return nil, refuse(400, "01071349:3: File object by name (%s) is in use.", path)
		}
		delete(files, path)
		return object{}, nil
	}
	return nil, refuse(405, "method %s is not supported", method)
}

// newPath returns the path of a new object.
func (c *config) newPath(sent object) (string, error) {
	name, folder := text(sent["name"]), "/"+text(sent["partition"])
	if folder == "/" {
		folder = "/Common"
	}
	if sub := text(sent["subPath"]); sub != "" {
		folder += "/" + sub
	}
	if strings.HasPrefix(name, "/") {
		folder, name = name[:strings.LastIndex(name, "/")], name[strings.LastIndex(name, "/")+1:]
	}
	if name == "" || strings.ContainsAny(name, "/ ~") {
		return "", refuse(400, "01020057:3: The name (%s) is not valid.", name)
	}
	if !slices.Contains(c.Partitions, folder) {
		return "", notFound("folder", folder)
	}
	return folder + "/" + name, nil
}

func partitionOf(path string) string { return strings.Split(path+"/", "/")[1] }

// setFile copies an upload into a file.
func (d *Device) setFile(files map[string]*file, kind, path string, sent object) (object, error) {
	if err := known(sent, "name", "partition", "subPath", "sourcePath", "checksum", "passphrase"); err != nil {
		return nil, err
	}
	name, ok := strings.CutPrefix(strings.Replace(text(sent["sourcePath"]), "file:///", "file:/", 1), "file:"+Downloads)
	data, uploaded := d.uploads[name]
	if !ok || !uploaded {
		return nil, refuse(400, "Failed! exit_code (37).")
	}
	if kind == sslKey {
		if _, err := pemutil.ParseKey(data); err != nil {
			return nil, refuse(400, "01070313:3: Error reading key PEM file %s for profile or file object.", path)
		}
	} else if _, err := pemutil.ParseCertificates(data); err != nil {
		return nil, refuse(400, "01070712:3: unable to validate certificate, unable to load %s", path)
	}
	if f := files[path]; f != nil {
		d.count++
		files[path] = parsed(&file{Content: bytes.Clone(data), Source: text(sent["sourcePath"]), Created: f.Created, Revision: d.count})
	} else {
		files[path] = d.newFile(bytes.Clone(data), text(sent["sourcePath"]))
	}
	return d.showFile(kind, path, files[path]), nil
}

// listFiles returns a collection. A filter names a partition
// (https://clouddocs.f5.com/api/icontrol-rest/APIRef.html, OData).
func (d *Device) listFiles(kind string, files map[string]*file, filter string) (object, error) {
	partition, ok := strings.CutPrefix(filter, "partition eq ")
	if filter != "" && !ok {
		return nil, refuse(400, "bad filter %q", filter)
	}
	items := []any{}
	for path, f := range files {
		if partition == "" || partitionOf(path) == partition {
			items = append(items, d.showFile(kind, path, f))
		}
	}
	return object{"kind": "tm:sys:file:" + kind + ":" + kind + "collectionstate", "selfLink": d.link("/mgmt/tm/sys/file/" + kind), "items": items}, nil
}

func (d *Device) showFile(kind, path string, f *file) object {
	slash := strings.LastIndex(path, "/")
	o := object{
		"kind": "tm:sys:file:" + kind + ":" + kind + "state", "name": path[slash+1:], "fullPath": path, "partition": partitionOf(path),
		"generation": f.Revision, "revision": f.Revision, "selfLink": d.link("/mgmt/tm/sys/file/" + kind + "/" + strings.ReplaceAll(path, "/", "~")),
		"checksum":   fmt.Sprintf("SHA1:%d:%x", len(f.Content), sha1.Sum(f.Content)),
		"createTime": f.Created.Format(time.RFC3339), "createdBy": "admin", "lastUpdateTime": f.Created.Format(time.RFC3339),
		"mode": 33184, "size": len(f.Content), "sourcePath": f.Source, "updatedBy": "admin",
	}
	if folder, ok := strings.CutPrefix(path[:slash], "/"+partitionOf(path)+"/"); ok {
		o["subPath"] = folder
	}
	if kind == sslKey {
		o["securityType"], o["keyType"] = "normal", f.keyType()
		return o
	}
	if leaf := f.leaf; leaf != nil {
		o["isBundle"] = fmt.Sprint(bytes.Count(f.Content, []byte("-----BEGIN")) > 1)
		o["fingerprint"] = fmt.Sprintf("SHA256/%X", sha256.Sum256(leaf.Raw))
		o["subject"], o["issuer"] = leaf.Subject.String(), leaf.Issuer.String()
		o["expirationDate"], o["expirationString"] = leaf.NotAfter.Unix(), leaf.NotAfter.Format("Jan _2 15:04:05 2006 GMT")
		o["serialNumber"] = leaf.SerialNumber.String()
	}
	return o
}

// keyType returns mcpd's name for the type of a key.
func (f *file) keyType() string {
	if f.private == nil {
		return "unknown"
	}
	switch f.private.Public().(type) {
	case *rsa.PublicKey:
		return "rsa-private"
	case *ecdsa.PublicKey:
		return "ec-private"
	}
	return "unknown"
}
