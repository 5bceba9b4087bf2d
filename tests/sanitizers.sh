#!/usr/bin/env bash
# Build the native code with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy, and run the tests of the kernels
# on it, but not those of what PyTorch does with operators. Needs GCC and an environment as run_tests.sh sets it up; flags
# go to pytest. Of the two instruction sets of one width of vectors one will do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=2 # a race between threads writes where it should not
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py pyproject.toml README.md LICENSE benchmarks cc_attention libs networks tests utils "$copy"
cd "$copy"
rm -f cc_attention/*.so
sanitize="-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
printf '#!/bin/sh\nexec g++ "$@" %s\n' "$sanitize" >compiler # last on the line: after the -O2 of setup.py
chmod +x compiler
FORCE_CUDA=0 CC=$copy/compiler CXX=$copy/compiler python setup.py --quiet build_ext --inplace >build.log 2>&1 || {
    cat build.log
    exit 1
}
nm -D cc_attention/_C.abi3.so >symbols
grep -q __asan_ symbols
grep -q __ubsan_ symbols
# Python and PyTorch are not built with them: their libraries have to come first, and what they leak is not ours. An
# allocation that is too big fails as it does without them.
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:log_path=$copy/report" UBSAN_OPTIONS="print_stacktrace=1:log_path=$copy/report"
with_sanitizers() { LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$@"; }
with_sanitizers python -c "from cc_attention import native; assert native.LOADED" # or its tests would all be skipped
with_sanitizers python -m pytest -p no:cacheprovider tests/test_criss_cross_native.py tests/test_abn_native.py \
    -m "not slow and not emulated" \
    -k "(not avx512 or avx512_bf16) and not opcheck and not compiled and not exported and not gradcheck" "$@" || {
    cat "$copy"/report.* # pytest has kept what was printed, and the process may be gone
    exit 1
}
