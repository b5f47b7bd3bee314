#!/usr/bin/env bash
# Installs NVIDIA's CUDA compiler from PyPI into target/cuda-toolkit, where build.rs finds it.
# Needs python3 with pip, and g++ (nvcc preprocesses with it); needs neither root nor a GPU.
#
#   tools/install-nvcc.sh           nvcc 13.0: PTX for compute_75 and newer
#   tools/install-nvcc.sh --sm70    also NVRTC and ptxas 12.9, into target/cuda-toolkit/sm70:
#                                   nvcc 13 dropped sm_70 (TITAN V); the build then adds kernels for
#                                   it, and tools/kernel-report.sh needs them
#
# Running it again does nothing where the compiler already works. A failed or interrupted run
# leaves nothing behind that looks installed: packages go into a folder of their own, a kernel is
# compiled with them, and only then is the folder renamed into place.
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
fail() { echo "install-nvcc: $*" >&2; exit 1; }

sm70=no
for argument in "$@"; do
    case $argument in
        --sm70) sm70=yes ;;
        -h | --help) usage; exit 0 ;;
        *) echo "install-nvcc: unknown option $argument (see --help)" >&2; exit 2 ;;
    esac
done

root=$(cd "$(dirname "$0")/.." && pwd)
prefix=$root/target/cuda-toolkit
# One release throughout: the parts of a toolkit must match. 13.0 is the first CUDA 13, so its PTX
# loads with every driver of that family (R580 and newer).
nvcc_packages=(nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85)
sm70_packages=(nvidia-cuda-nvcc-cu12==12.9.86 nvidia-cuda-nvrtc-cu12==12.9.86
    nvidia-cuda-runtime-cu12==12.9.79)

mkdir -p "$root/target"
work=$(mktemp -d "$root/target/cuda-toolkit.XXXXXX.partial")
trap 'rm -rf "$work"' EXIT

cat > "$work/trial.cu" <<'TRIAL'
#include <cuda_fp16.h>
extern "C" __global__ void trial(const __half *x, float *y) {
    y[threadIdx.x] = __half2float(x[threadIdx.x]);
}
TRIAL

# Whether the toolkit in folder $1 compiles a kernel; its words are in $work/log.
nvcc_works() {
    [ -x "$1/bin/nvcc" ] || { echo "$1/bin/nvcc is missing" > "$work/log"; return 1; }
    "$1/bin/nvcc" --ptx -arch=compute_75 -o "$work/trial.ptx" "$work/trial.cu" \
        > "$work/log" 2>&1 && grep -q '\.entry trial' "$work/trial.ptx"
}

sm70_works() {
    python3 "$root/tools/nvrtc.py" --toolkit "$1" --arch 70 "$work/trial.cu" "$work/trial70.ptx" \
        > "$work/log" 2>&1 &&
        "$1/bin/ptxas" -arch=sm_70 -o "$work/trial.cubin" "$work/trial70.ptx" >> "$work/log" 2>&1
}

install_packages() { # folder, packages
    local folder=$1
    shift
    python3 -m pip --version > /dev/null 2>&1 ||
        fail "needs python3 with pip (Debian, Ubuntu: apt install python3-pip)"
    echo "downloading $* (a few hundred MB)"
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --no-deps --no-compile \
        --only-binary=:all: --disable-pip-version-check --target "$folder" "$@" ||
        fail "pip could not install $*; nothing was changed"
}

# Puts folder $1 where $2 is wanted; what was there and did not work goes.
put() {
    if [ -e "$2" ] || [ -L "$2" ]; then mv -T "$2" "$work/old"; fi
    mv -T "$1" "$2"
    rm -rf "$work/old"
}

command -v g++ > /dev/null || [ -n "${NVCC_CCBIN:-}" ] ||
    fail "nvcc needs a C++ compiler (Debian, Ubuntu: apt install g++)"

if nvcc_works "$prefix"; then
    echo "already installed: $prefix"
else
    install_packages "$work/site" "${nvcc_packages[@]}"
    nvcc_works "$work/site/nvidia/cu13" ||
        fail "the packages came but nvcc does not compile a trivial kernel: $(cat "$work/log")"
    put "$work/site/nvidia/cu13" "$prefix"
    echo "installed: $prefix"
    touch "$root/build/ptx.rs" # cargo watches no file that was not there: let it look again
fi
"$prefix/bin/nvcc" --version | grep release

if [ $sm70 = yes ]; then
    if sm70_works "$prefix/sm70"; then
        echo "already installed: $prefix/sm70"
    else
        install_packages "$work/site12" "${sm70_packages[@]}"
        # One folder with bin, lib and include, like a toolkit.
        mkdir -p "$work/sm70/bin" "$work/sm70/lib" "$work/sm70/include"
        mv "$work"/site12/nvidia/cuda_nvcc/bin/ptxas "$work/sm70/bin/"
        mv "$work"/site12/nvidia/cuda_nvrtc/lib/libnvrtc.so.12 \
            "$work"/site12/nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.* "$work/sm70/lib/"
        cp -r "$work"/site12/nvidia/cuda_runtime/include/. \
            "$work"/site12/nvidia/cuda_nvcc/include/. "$work/sm70/include/"
        sm70_works "$work/sm70" ||
            fail "the packages came but do not compile for sm_70: $(cat "$work/log")"
        put "$work/sm70" "$prefix/sm70"
        echo "installed: $prefix/sm70"
        touch "$root/build/ptx.rs"
    fi
    "$prefix/sm70/bin/ptxas" --version | grep release
fi
