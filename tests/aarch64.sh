#!/usr/bin/env bash
# Compile the CPU's kernels for aarch64 and compare them with plain loops (baseline_kernels.cpp). Another machine does so
# with a cross compiler and qemu: those on the PATH or else Debian's, unpacked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

compiler=(aarch64-linux-gnu-g++ -static) emulator=qemu-aarch64
download() { # both, and what they need that is not installed
    apt-get install --simulate --no-install-recommends g++-aarch64-linux-gnu qemu-user |
        sed -n 's/^Inst \([^ ]*\).*/\1/p' | xargs apt-get download --quiet=2
}
if [[ $(uname -m) =~ ^(aarch64|arm64)$ ]]; then
    compiler=(${CXX:-c++}) emulator=
elif ! command -v ${compiler[0]} >/dev/null || ! command -v $emulator >/dev/null; then
    (cd "$folder" && { download || { apt-get update --quiet=2 && download; }; } 2>/dev/null &&
        for package in *.deb; do dpkg -x "$package" debian; done) || {
        echo "error: expected ${compiler[0]} and $emulator on the PATH, or Debian's apt-get to fetch them" >&2
        exit 1
    }
    export PATH="$folder/debian/usr/bin:$PATH" LD_LIBRARY_PATH="$folder/debian/usr/lib/$(uname -m)-linux-gnu"
fi
"${compiler[@]}" --version | sed -n 1p
flags=$(.venv/bin/python -c "from building import libraries; print(*libraries.CXX_FLAGS)")
"${compiler[@]}" $flags -Werror */csrc/cpu/*_baseline.cpp tests/baseline_kernels.cpp -o "$folder/kernels"
$emulator "$folder/kernels"
