#!/usr/bin/env bash
# What the compiler says about every kernel: registers, shared memory, spills and occupancy on
# sm_70, sm_75 and sm_90. Writes benches/results/kernel-report-DATE.md (or the file given) and
# exits with 1 where a kernel spills or does not assemble. Needs no GPU.
#
#   tools/kernel-report.sh [OUT.md]
#
# sm_75 and sm_90 go through nvcc 13 and its ptxas; sm_70, which nvcc 13 dropped, through NVRTC and
# ptxas 12.9 (tools/install-nvcc.sh --sm70, which is run here where it is needed).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
toolkit=$root/target/cuda-toolkit
date=$(date -u +%Y-%m-%d)
out=${1:-$root/benches/results/kernel-report-$date.md}
shopt -s nullglob
kernels=("$root"/kernels/*.cu)
if [ ${#kernels[@]} = 0 ]; then
    echo "kernel-report: $root/kernels holds no .cu file" >&2
    exit 1
fi
if [ ! -x "$toolkit/bin/ptxas" ] || [ ! -x "$toolkit/sm70/bin/ptxas" ]; then
    "$root/tools/install-nvcc.sh" --sm70
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=$work/failures
: > "$failures"

# Assembles kernel file $1 for sm_$2; ptxas's report goes to $work/NAME.ARCH.log.
assemble() {
    local source=$1 arch=$2 name
    name=$(basename "$source" .cu)
    local ptx=$work/$name.$arch.ptx log=$work/$name.$arch.log ptxas=$toolkit/bin/ptxas
    if [ "$arch" = 70 ]; then
        ptxas=$toolkit/sm70/bin/ptxas
        python3 "$root/tools/nvrtc.py" --toolkit "$toolkit/sm70" --arch 70 "$source" "$ptx" \
            > "$log" 2>&1
    else
        "$toolkit/bin/nvcc" --ptx "-arch=compute_$arch" -std=c++17 -O3 -o "$ptx" "$source" \
            > "$log" 2>&1
    fi && "$ptxas" -v "-arch=sm_$arch" -o "$work/$name.$arch.cubin" "$ptx" > "$log" 2>&1
}

# The same, keeping what went wrong for the end.
assemble_or_note() {
    local name
    name=$(basename "$1")
    assemble "$1" "$2" || echo "kernels/$name does not assemble for sm_$2" > "$work/${name%.cu}.$2.failed"
}

# As many at a time as there are processors.
for source in "${kernels[@]}"; do
    for arch in 70 75 90; do
        while [ "$(jobs -pr | wc -l)" -ge "$(nproc)" ]; do wait -n || true; done
        assemble_or_note "$source" "$arch" &
    done
done
wait
for failed in "$work"/*.failed; do
    cat "$failed" >> "$failures"
    cat "$failed" "${failed%.failed}.log" >&2
done

mkdir -p "$(dirname "$out")"
python3 "$root/tools/kernel_table.py" "$work" "$failures" > "$work/table.md"
{
    echo "# What the compiler says about the kernels, $date"
    echo
    echo "Command: \`tools/kernel-report.sh\`, commit $(git -C "$root" describe --always --dirty)."
    echo "sm_75, sm_90: nvcc and ptxas $("$toolkit/bin/ptxas" --version | sed -n 's/.*release.*, V//p');"
    echo "sm_70: NVRTC and ptxas $("$toolkit/sm70/bin/ptxas" --version | sed -n 's/.*release.*, V//p')."
    echo
    cat "$work/table.md"
} > "$out.partial"
mv "$out.partial" "$out"
cat "$out"
if [ -s "$failures" ]; then
    echo "kernel-report: FAIL" >&2
    cat "$failures" >&2
    exit 1
fi
