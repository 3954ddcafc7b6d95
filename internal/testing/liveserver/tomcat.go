package liveserver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"certctl-agent/internal/tlsprobe"
)

const (
	tomcatHome    = "/usr/share/tomcat10"
	tomcatManager = "/usr/share/tomcat10-admin/manager"
)

// Tomcat's manager, on a separate port, makes it reload the key store.
const tomcatServer = `<Server port="-1">
  <Service name="Catalina">
    <Connector port="%[1]s" address="127.0.0.1"/>
    <Connector port="%[2]s" address="127.0.0.1" SSLEnabled="true" scheme="https" secure="true">
      <SSLHostConfig>
        <Certificate certificateKeystoreFile="%[3]s" certificateKeystoreType="PKCS12" certificateKeystorePassword="%[4]s" certificateKeyAlias="server"/>
      </SSLHostConfig>
    </Connector>
    <Engine name="Catalina" defaultHost="localhost">
      <Realm className="org.apache.catalina.realm.MemoryRealm"/>
      <Host name="localhost" appBase="webapps" autoDeploy="false">
        <Context path="/manager" docBase="%[5]s" privileged="true"/>
      </Host>
    </Engine>
  </Service>
</Server>
`

const tomcatUsers = `<tomcat-users><user username="certctl" password="reload" roles="manager-script"/></tomcat-users>
`

// tomcatReload fails unless the manager answers OK. The header authenticates certctl:reload.
const tomcatReload = `#!%[1]s
use strict;
use IO::Socket::INET;

my $manager = IO::Socket::INET->new(PeerAddr => "127.0.0.1:%[2]s", Timeout => 30) or die "connect to the manager: $@\n";
print $manager "GET /manager/text/sslReload HTTP/1.0\r\nAuthorization: Basic Y2VydGN0bDpyZWxvYWQ=\r\n\r\n";
my $answer = join("", <$manager>);
$answer =~ /^OK - /m or die $answer;
`

// StartTomcat starts Tomcat 10 with a PKCS#12 key store.
func StartTomcat(ctx context.Context, dir string, pair Pair) (*Server, error) {
	java, err := program("java")
	if err != nil {
		return nil, err
	}
	perl, err := program("perl")
	if err != nil {
		return nil, err
	}
	for _, path := range []string{tomcatHome, tomcatManager} {
		if _, err := os.Stat(path); err != nil {
			return nil, fmt.Errorf("%s: %w", path, ErrMissing)
		}
	}
	ports, err := freePorts(2)
	if err != nil {
		return nil, err
	}
	store, err := newStore(pair)
	if err != nil {
		return nil, err
	}
	path, conf, reload := filepath.Join(dir, tlsDir, "server.p12"), filepath.Join(dir, "conf"), filepath.Join(dir, "reload-tomcat")
	for _, name := range []string{tlsDir, "conf", "webapps", "temp", "logs", "work"} {
		err = errors.Join(err, os.Mkdir(filepath.Join(dir, name), 0o755))
	}
	err = errors.Join(err,
		os.WriteFile(path, store, 0o600),
		os.WriteFile(filepath.Join(conf, "server.xml"), fmt.Appendf(nil, tomcatServer, ports[0], ports[1], path, StorePassword, tomcatManager), 0o600),
		os.WriteFile(filepath.Join(conf, "web.xml"), []byte("<web-app/>\n"), 0o644),
		os.WriteFile(filepath.Join(conf, "tomcat-users.xml"), []byte(tomcatUsers), 0o600),
		os.WriteFile(reload, fmt.Appendf(nil, tomcatReload, perl, ports[0]), 0o755))
	if err != nil {
		return nil, err
	}
	s := &Server{
		Name: "Tomcat",
		Type: "JavaKeystore",
		Config: map[string]any{
			"keystore_path":     path,
			"keystore_password": StorePassword,
			"reload_command":    reload,
			"host":              "127.0.0.1",
			"port":              ports[1],
		},
		Endpoint: tlsprobe.Endpoint{Address: "127.0.0.1:" + ports[1]},
		CertPath: path,
	}
	// The command that catalina.sh runs; catalina.sh itself would start a child process.
	err = s.run(java, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx256m",
		"--add-opens=java.base/java.lang=ALL-UNNAMED", "--add-opens=java.base/java.io=ALL-UNNAMED",
		"-Dcatalina.home="+tomcatHome, "-Dcatalina.base="+dir, "-Djava.io.tmpdir="+filepath.Join(dir, "temp"),
		"-classpath", filepath.Join(tomcatHome, "bin/bootstrap.jar")+":"+filepath.Join(tomcatHome, "bin/tomcat-juli.jar"),
		"org.apache.catalina.startup.Bootstrap", "start")
	if err != nil {
		return nil, err
	}
	return s, s.ready(ctx)
}
