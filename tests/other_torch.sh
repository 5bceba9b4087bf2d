#!/usr/bin/env bash
# Run the operators' tests under another release of PyTorch, with the native code that run_tests.sh has built. Only the
# integration with PyTorch is tested: dispatch, gradients, autocast, compiling; not each instruction set.
#
#   tests/other_torch.sh 2.13.0 [flags of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
release=$1
shift
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
built=$(cksum cc_attention/_C.abi3.so)
.venv/bin/python -m venv "$environment"
"$environment/bin/pip" install --quiet --disable-pip-version-check "torch==$release" numpy pytest hypothesis
"$environment/bin/python" -c "import torch; from cc_attention import native; assert native.LOADED; print('PyTorch', torch.__version__)"
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -p no:cacheprovider \
    tests/test_criss_cross.py tests/test_criss_cross_native.py tests/test_abn.py tests/test_abn_native.py \
    -m "not slow" -k "not baseline and not avx2 and not avx512" "$@"
[[ $(cksum cc_attention/_C.abi3.so) == "$built" ]]
