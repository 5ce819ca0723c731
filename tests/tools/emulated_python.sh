#!/usr/bin/env bash
# Makes FOLDER/python, Debian's Python for 64-bit Arm in an emulator: emulated_python.sh FOLDER
# Only root can: apt must learn of the architecture. Needs qemu-aarch64. The packages are those of Debian 12.
set -euo pipefail
mkdir -p "$1/packages"
cd "$1"
root=$PWD/root
minor=$(apt-cache depends python3 | sed -n 's/.*Depends: python3\.\([0-9]*\)$/\1/p')
packages=(python3."$minor"-minimal libpython3."$minor"-minimal libpython3."$minor"-stdlib libc6 libcrypt1 libgcc-s1
  libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libuuid1)
if ! dpkg --print-foreign-architectures | grep -qx arm64; then
  dpkg --add-architecture arm64
  trap 'dpkg --remove-architecture arm64' EXIT
fi
apt-get update
cd packages
apt-get download "${packages[@]/%/:arm64}"
for package in *.deb; do dpkg -x "$package" "$root"; done
printf '#!/bin/sh\nexec qemu-aarch64 -L %s -cpu max %s/usr/bin/python3.%s "$@"\n' "$root" "$root" "$minor" > ../python
chmod +x ../python
