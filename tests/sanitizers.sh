#!/usr/bin/env bash
# The native code with sanitizers: CUDA kernels in the emulator (sanitized_kernels.py), and the CPU's, built in a copy with
# AddressSanitizer and UndefinedBehaviorSanitizer, by the tests of the kernels, but not those of their integration with
# PyTorch. Needs GCC and the environment of run_tests.sh; flags go to pytest. Of the two instruction sets with the same
# vector width only one is tested.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=2 # more than one, to find races
python -m pytest -p no:cacheprovider tests/sanitized_kernels.py "$@"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r setup.py building pyproject.toml requirements.txt README.md LICENSE benchmarks cc_attention libs networks tests utils "$copy"
cd "$copy"
rm -f cc_attention/*.so
sanitize="-O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
printf '#!/bin/sh\nexec g++ "$@" %s\n' "$sanitize" >compiler # appended, to override -O2
chmod +x compiler
FORCE_CUDA=0 CXX=$copy/compiler python setup.py --quiet build_ext --inplace >build.log 2>&1 || {
    cat build.log
    exit 1
}
nm -D cc_attention/_C.abi3.so >symbols
grep -q __asan_ symbols
grep -q __ubsan_ symbols
# Python and PyTorch are not built with sanitizers: the libraries of these must be loaded first, and leaks are not ours.
# An allocation that is too large fails as without sanitizers.
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:log_path=$copy/report" UBSAN_OPTIONS="print_stacktrace=1:log_path=$copy/report"
with_sanitizers() { LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" "$@"; }
with_sanitizers python -c "from cc_attention import native; assert native.LOADED" # otherwise all tests would be skipped
with_sanitizers python -m pytest -p no:cacheprovider tests/test_criss_cross_native.py tests/test_abn_native.py \
    -m "not slow" \
    -k "(not avx512 or avx512_bf16) and not opcheck and not compiled and not exported and not gradcheck" "$@" || {
    cat "$copy"/report.* # since pytest captures output, and the process may have crashed
    exit 1
}
