#!/bin/sh
# Builds the Debian package: deb/build.sh BINARY ARCH VERSION OUTDIR
# The same input gives the same bytes: every file has the time SOURCE_DATE_EPOCH.
set -eu
binary=$1 arch=$2 version=$3 out=$4
here=$(cd "$(dirname "$0")" && pwd)
deploy=$(dirname "$here")
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}"

# From git describe to a Debian version: v1.2.3-4-gabc is newer than 1.2.3; a bare commit sorts by
# its time, before any release. A hyphen would begin a Debian revision.
case $version in
v[0-9]*) version=${version#v} ;;
[0-9]*.*) ;;
*) version="0~$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).$version" ;;
esac
version=$(printf %s "$version" | sed 's/-rc/~rc/; s/-/+/; s/-/./g; s/[^A-Za-z0-9.+~]/./g')

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
umask 022
put() { install -D -m "$1" "$2" "$root$3"; }

put 755 "$binary" /usr/bin/certctl-agent
for unit in certctl-agent certctl-agent-unprivileged; do
	put 644 "$deploy/systemd/$unit.service" /lib/systemd/system/$unit.service
done
put 600 "$here/agent.env" /etc/certctl/agent.env
mkdir -p "$root/etc/certctl/targets.d"
put 644 "$here/certctl-agent.sysusers" /usr/lib/sysusers.d/certctl-agent.conf
put 644 "$here/certctl-agent.tmpfiles" /usr/lib/tmpfiles.d/certctl-agent.conf
doc=/usr/share/doc/certctl-agent
put 644 "$here/copyright" $doc/copyright
put 644 "$deploy/systemd/50-certctl-agent.rules" $doc/examples/50-certctl-agent.rules
for example in "$deploy"/systemd/examples/*.conf; do
	put 644 "$example" "$doc/examples/$(basename "$example")"
done
# Errors and the changelog name docs/….md, and these pages link to each other.
repo=$(dirname "$deploy")
put 644 "$repo/README.md" $doc/README.md
for page in "$repo"/docs/*.md "$repo"/docs/targets/*.md; do
	put 644 "$page" "$doc/${page#"$repo"/}"
done
put 644 "$deploy/man/certctl-agent.8" /usr/share/man/man8/certctl-agent.8
gzip -9n "$root/usr/share/man/man8/certctl-agent.8"
printf 'certctl-agent (%s) unstable; urgency=medium\n\n  * See "Replace the agent you run now" in docs/operations.md of this version.\n  * See "Changed messages" in docs/operations.md if you search its log.\n\n -- certctl-agent maintainers <certctl-agent@example.org>  %s\n' \
	"$version" "$(LC_ALL=C date -u -R -d "@$SOURCE_DATE_EPOCH")" | gzip -9n >"$root$doc/changelog.gz"

mkdir "$root/DEBIAN"
size=$(du -sk --apparent-size --exclude=DEBIAN "$root" | cut -f1)
sed "s/@VERSION@/$version/; s/@ARCH@/$arch/; s/@SIZE@/$size/" "$here/control.in" >"$root/DEBIAN/control"
install -m 644 "$here/conffiles" "$root/DEBIAN/conffiles"
install -m 755 "$here/postinst" "$here/prerm" "$here/postrm" "$root/DEBIAN/"
(cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\n' | LC_ALL=C sort | xargs md5sum >DEBIAN/md5sums)
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$out"
rm -f "$out"/certctl-agent_*_"$arch".deb # so that `apt install ./dist/certctl-agent_*.deb` finds one
dpkg-deb --root-owner-group -Zxz --build "$root" "$out/certctl-agent_${version}_$arch.deb"
