#!/bin/sh
# Packs a release: release.sh VERSION COMMIT OUTDIR PLATFORM…
#
# For each platform a tarball with the service files and an SBOM, and SHA256SUMS for all. Every
# binary is built twice, the second time from a copy of the sources at another path with an empty
# build cache; both must be identical.
set -eu
version=$1 commit=$2 out=$3
shift 3
repo=$(cd "$(dirname "$0")/.." && pwd)
go=${GO:-go}
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-0}" CGO_ENABLED=0
umask 022

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/elsewhere" "$out"
out=$(cd "$out" && pwd)
# SHA256SUMS covers this release alone.
rm -f "$out"/certctl-agent_* "$out/SHA256SUMS"
(cd "$repo" && tar cf - go.mod cmd internal Makefile) | tar xf - -C "$work/elsewhere"

# Uses the Makefile, so that a release is what `make build` makes.
build() { # DIR OS ARCH FILE
	GOOS=$2 GOARCH=$3 make -s -C "$1" build GO="$go" VERSION="$version" COMMIT="$commit" BIN="$4"
}

sbom() { # BINARY NAME: SPDX from what the linker wrote into the binary
	$go version -m "$1" | awk -v name="$2" -v version="$version" -v sum="$(sha256sum "$1" | cut -d' ' -f1)" \
		-v created="$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)" '
		function package(id, what, v, purl) {
			printf "\nPackageName: %s\nSPDXID: SPDXRef-%s\nPackageVersion: %s\n", what, id, v
			printf "PackageDownloadLocation: NOASSERTION\nFilesAnalyzed: false\n"
			if (purl) printf "ExternalRef: PACKAGE-MANAGER purl %s\n", purl
		}
		NR == 1 { toolchain = $NF }
		$1 == "dep" { n++; dep[n] = $2; depversion[n] = $3 }
		$1 == "build" { setting[++settings] = $2 }
		END {
			print "SPDXVersion: SPDX-2.3\nDataLicense: CC0-1.0\nSPDXID: SPDXRef-DOCUMENT"
			printf "DocumentName: %s\nDocumentNamespace: https://certctl-agent.invalid/spdx/%s-%s\n", name, name, sum
			printf "Creator: Tool: go-version-m\nCreated: %s\n", created
			package("agent", "certctl-agent", version)
			printf "PackageChecksum: SHA256: %s\nPackageLicenseDeclared: Apache-2.0\n", sum
			printf "PackageComment: <text>built with"
			for (i = 1; i <= settings; i++) printf " %s", setting[i]
			print "</text>"
			package("std", "stdlib", toolchain, "pkg:golang/stdlib@" substr(toolchain, 3))
			print "PackageLicenseDeclared: BSD-3-Clause"
			for (i = 1; i <= n; i++) package("dep" i, dep[i], depversion[i], "pkg:golang/" dep[i] "@" depversion[i])
			print "\nRelationship: SPDXRef-DOCUMENT DESCRIBES SPDXRef-agent"
			print "Relationship: SPDXRef-agent STATIC_LINK SPDXRef-std"
			for (i = 1; i <= n; i++) print "Relationship: SPDXRef-agent STATIC_LINK SPDXRef-dep" i
		}'
}

for platform; do
	os=${platform%/*} arch=${platform#*/}
	name=certctl-agent_${version}_${os}_$arch
	dir=$work/$name
	mkdir "$dir"
	build "$repo" "$os" "$arch" "$dir/certctl-agent"
	GOCACHE="$work/cache" build "$work/elsewhere" "$os" "$arch" "$work/again"
	cmp "$dir/certctl-agent" "$work/again" || { echo "$platform: two builds differ" >&2; exit 1; }

	cp -R "$repo/LICENSE" "$repo/README.md" "$repo/docs" "$repo/deploy/deb/agent.env" "$repo/deploy/man/certctl-agent.8" "$dir/"
	chmod 600 "$dir/agent.env"
	case $os in
	linux) cp -R "$repo/deploy/systemd" "$dir/"; cp "$repo/deploy/deb/certctl-agent.sysusers" "$repo/deploy/deb/certctl-agent.tmpfiles" "$dir/systemd/" ;;
	darwin) cp -R "$repo/deploy/launchd" "$dir/" ;;
	esac
	sbom "$dir/certctl-agent" "$name" >"$out/$name.spdx"
	tar -C "$work" --sort=name --format=ustar --owner=0:0 --group=0:0 --numeric-owner --mode=u+w,go-w \
		--mtime="@$SOURCE_DATE_EPOCH" -cf - "$name" | gzip -9n >"$out/$name.tar.gz"
	echo "$name.tar.gz"
done
(cd "$out" && sha256sum ./*.tar.gz ./*.spdx | sed 's,\./,,' >SHA256SUMS)
