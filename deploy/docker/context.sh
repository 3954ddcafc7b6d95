#!/bin/sh
# Makes the context of the image: docker/context.sh BINARY ARCH DIR
set -eu
binary=$1 arch=$2 dir=$3
roots=${CA_ROOTS:-/etc/ssl/certs/ca-certificates.crt}
[ -s "$roots" ] || { echo "no CA roots in $roots: install ca-certificates, or set CA_ROOTS" >&2; exit 1; }

rm -rf "$dir/rootfs"
mkdir -p "$dir/rootfs/etc/ssl/certs" "$dir/rootfs/var/lib/certctl/keys" "$dir/rootfs/certs"
install -m 755 "$binary" "$dir/rootfs/certctl-agent"
install -m 644 "$roots" "$dir/rootfs/etc/ssl/certs/ca-certificates.crt"

# Names only what the image adds, so that directories of another base stay as they are.
add() { tar -C "$dir/rootfs" --format=ustar --mtime="@${SOURCE_DATE_EPOCH:-0}" --no-recursion -rf "$dir/rootfs-$arch.tar" "$@"; }
rm -f "$dir/rootfs-$arch.tar"
add --owner=0:0 --group=0:0 certctl-agent etc/ssl/certs/ca-certificates.crt
add --owner=1000:1000 --group=1000:1000 --mode=700 var/lib/certctl/keys
add --owner=1000:1000 --group=1000:1000 --mode=755 certs
rm -rf "$dir/rootfs"
cp "$(dirname "$0")/Dockerfile" "$dir/Dockerfile"
