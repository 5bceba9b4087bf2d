#!/usr/bin/env bash
# Compile all native sources with the oldest that is promised: the headers of PyTorch 2.10 and, by clang, those of CUDA 12.0
# with its ptxas, since NVIDIA has no nvcc before CUDA 13 among its wheels. So clang is tested as well. Nothing is linked.
#
#   tests/oldest_toolchain.sh [another release of CUDA 12, 12.6]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
torch=2.10.0 cuda=${1:-12.0}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

download() { # pip's arguments...
    .venv/bin/pip download --quiet --disable-pip-version-check --no-deps --dest "$folder" "$@"
}
unpack() { # what, into what
    for wheel in "$folder"/$1*.whl; do .venv/bin/python -m zipfile -e "$wheel" "$2"; done
}
# The wheel for Macs is a tenth of the others, and has the same headers. The cccl of 12.0 lacks nv/target.
download --only-binary=:all: --platform macosx_11_0_arm64 --python-version 3.11 "torch==$torch"
download "nvidia-cuda-runtime-cu12==$cuda.*" "nvidia-cuda-nvcc-cu12==$cuda.*" "nvidia-cuda-cccl-cu12==12.6.*"
unpack torch "$folder/torch"
unpack nvidia "$folder/wheels"
mkdir "$folder/cuda"
for wheel in "$folder"/wheels/nvidia/*/; do cp -r "$wheel". "$folder/cuda"; done
touch "$folder/cuda/include/curand_mtgp32_kernel.h" # clang includes it, to no purpose here
chmod +x "$folder/cuda/bin/ptxas"

clang=clang++-19
if ! command -v $clang >/dev/null; then # Debian's packages, unpacked
    (cd "$folder" && for package in clang-19 libclang-cpp19 libclang-common-19-dev libllvm19 libz3-4; do
        apt-get download --quiet=2 $package || { apt-get update --quiet=2 && apt-get download --quiet=2 $package; }
    done 2>/dev/null && for package in *.deb; do dpkg -x "$package" debian; done)
    clang=$folder/debian/usr/lib/llvm-19/bin/clang++
    export LD_LIBRARY_PATH=$folder/debian/usr/lib/x86_64-linux-gnu:$folder/debian/usr/lib/llvm-19/lib
fi
$clang --version | sed -n 1p

flags=(-std=c++17 -Wall -Werror -Wno-psabi -I. -isystem "$folder/torch/torch/include")
flags+=("$(.venv/bin/python -c "from building import pytorch; print(pytorch.STABLE_ABI)")")
for_cuda=(-x cuda "--cuda-path=$folder/cuda" --cuda-gpu-arch=sm_80 -Wno-unused-function -Wno-pass-failed -DUSE_CUDA)
for_cuda+=(-D__CUDACC_VER_MAJOR__=12 -D__CUDACC_VER_MINOR__=0 -D__CUDA_ARCH_LIST__=800) # as nvcc does
check() { # flags... --, sources...
    local words=()
    while [[ $1 != -- ]]; do
        words+=("$1")
        shift
    done
    printf '%s\n' "${@:2}" | xargs --max-procs=2 --replace "$clang" "${flags[@]}" "${words[@]}" {}
}
check -fsyntax-only -- $(ls */csrc/*.cpp */csrc/cpu/*.cpp | grep -v _avx)
check -O2 -S -o /dev/null -- cc_attention/csrc/cpu/line_attention_avx512_bf16.cpp # at which clang 16 and 17 crash
check "${for_cuda[@]}" -fsyntax-only -- */csrc/cuda/*.cu
check "${for_cuda[@]}" -O1 --cuda-device-only -c -o /dev/null -- */csrc/cuda/*_bfloat16.cu # ptxas takes the PTX, too
echo "all sources compile"
