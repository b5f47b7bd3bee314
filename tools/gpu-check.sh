#!/usr/bin/env bash
# Everything that has to be known about a GPU, in one command: all reference folders and the self
# test in f32 and f16, photos one after the other, NVIDIA's compute-sanitizer where it is installed,
# inference and training speed in both precisions. Writes one JSON and one Markdown file; exits with 1
# where a check failed.
#
#   tools/gpu-check.sh [--device cuda|emulated] [--binary FILE] [--out DIR] [--sizes "WxH ..."]
#                      [--iterations N] [--data CAMVID] [--limit SECONDS] [--commit ID]
#                      [--quick]
#
# Needs the built binary (the kernels are inside), tests/data and a shell; no compiler, no Python.
#   --device      emulated runs the same on the CPU, to test this script (implies --quick)
#   --binary      default: target/release/fpenet
#   --out         default: benches/results
#   --sizes       of the speed measurement, default: the three of the paper's Table 7
#   --data        also train on this CamVid folder, in both precisions: an epoch (--quick: a few
#                 seconds of a small network)
#   --commit      what is checked, where the copy of the tree has no git; default: git describe
#   --limit       seconds that one check may take, default: 300
#   --quick       small sizes (64x32 unless --sizes says otherwise): seconds on a GPU, to see that all of it runs
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
device=cuda binary=$root/target/release/fpenet out=$root/benches/results
sizes="" iterations="" data="" quick="" limit=300 commit=""
command_line="tools/gpu-check.sh $*"
wrong() { echo "gpu-check: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    option=$1
    case $option in
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        --quick) quick=yes; shift ;;
        --device | --binary | --out | --sizes | --iterations | --data | --limit | --commit)
            [ $# -ge 2 ] || wrong "$option needs a value (see --help)"
            printf -v "${option#--}" '%s' "$2"
            shift 2 ;;
        *) wrong "unknown option $option (see --help)" ;;
    esac
done
case $device in
    cuda) ;;
    emulated) quick=yes ;;
    *) wrong "--device: expected cuda or emulated, found $device" ;;
esac
if [ -n "$quick" ]; then
    : "${sizes:=64x32}" "${iterations:=2}"
else
    : "${sizes:=768x384 1024x512 1536x768}" "${iterations:=200}"
fi
[ -x "$binary" ] || wrong "$binary is not an executable: cargo build --release, or --binary FILE"
folders=("$root"/tests/data/*/model.safetensors)
[ -e "${folders[0]}" ] || wrong "$root/tests/data holds no reference folder"

# Where only PyTorch's copy of cuBLAS is installed, the loader has to be told.
if [ "$device" = cuda ] && ! ldconfig -p 2> /dev/null | grep -q libcublas.so; then
    found=$(python3 -c 'import glob, os, sys
hits = [h for p in sys.path for h in glob.glob(os.path.join(p, "nvidia/c*/lib/libcublas.so.*"))]
print(os.path.dirname(hits[0]) if hits else "")' 2> /dev/null)
    if [ -n "${found:-}" ]; then
        export LD_LIBRARY_PATH=$found${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    fi
fi

# A kernel that never ends would hold the card and the rest of the checks.
limited=()
if command -v timeout > /dev/null; then limited=(timeout --kill-after=10 "$limit"); fi
fpenet=("${limited[@]}" "$binary")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0 checks=0
: > "$work/checks.json"
: > "$work/checks.md"
: > "$work/logs.md"

# Text as a JSON string.
quote() {
    printf '"'
    sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/\t/\\t/g' | tr -d '\000-\011\013-\037' |
        sed -e ':a' -e 'N' -e '$!ba' -e 's/\n/\\n/g' | tr -d '\n'
    printf '"'
}

# check NAME COMMAND...: runs it, keeps outcome, time and output.
check() {
    local name=$1 log=$work/log start seconds status verdict
    shift
    start=$(date +%s.%N)
    "$@" > "$log" 2>&1
    status=$?
    seconds=$(awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.2f", b - a }')
    verdict=pass
    checks=$((checks + 1))
    if [ $status -ne 0 ]; then verdict=FAIL failed=$((failed + 1)); fi
    printf '%-4s %8s s  %s\n' "$verdict" "$seconds" "$name"
    [ $status -eq 0 ] || sed 's/^/    /' "$log"
    [ -s "$work/checks.json" ] && echo , >> "$work/checks.json"
    printf '{"name": %s, "exit_code": %d, "seconds": %s, "output": %s}' \
        "$(printf '%s' "$name" | quote)" $status "$seconds" "$(quote < "$log")" \
        >> "$work/checks.json"
    echo "| $name | $verdict | $seconds | $(tail -n 1 "$log" | tr '|' '/') |" >> "$work/checks.md"
    {
        echo "<details><summary>$name</summary>"
        echo
        echo '```'
        cat "$log"
        echo '```'
        echo "</details>"
    } >> "$work/logs.md"
    return $status
}

devices=$("$binary" devices 2>&1)
echo "$devices"
if ! printf '%s\n' "$devices" | grep -q "^$device *available"; then
    echo "gpu-check: there is no working $device device; nothing was checked" >&2
    exit 1
fi
card=$(printf '%s\n' "$devices" | sed -n "s/^$device *available *//p")
smi=""
if [ "$device" = cuda ] && command -v nvidia-smi > /dev/null; then
    smi=$(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit \
        --format=csv,noheader 2>&1 | head -n 1)
fi
: "${commit:=$(git -C "$root" describe --always --dirty 2> /dev/null || echo unknown)}"

for precision in f32 f16; do
    for model in "${folders[@]}"; do
        folder=$(dirname "$model")
        check "check $(basename "$folder") $precision" \
            "${fpenet[@]}" check --reference "$folder" --device "$device" --precision $precision
    done
    check "selftest $precision" "${fpenet[@]}" selftest --device "$device" --precision $precision
done
# Kernels that only a measurement chooses.
for variants in cascade=mma strided=paired stage3=persistent; do
    check "selftest f16 $variants" env FPENET_VARIANTS=$variants \
        "${fpenet[@]}" selftest --device "$device" --precision f16
done

# The same photo three times, copies and work overlapping: three times the same labels.
segment_thrice() {
    local resized=() results=$work/photos-$1
    if [ -n "$quick" ]; then resized=(--size 96x64); fi
    mkdir -p "$work/photos"
    for copy in a b c; do
        cp "$root/assets/example/street.jpg" "$work/photos/$copy.jpg" || return 1
    done
    "${fpenet[@]}" segment "$work/photos" --out "$results" --device "$device" --precision "$1" \
        "${resized[@]}" || return 1
    cmp "$results/a.labels.png" "$results/b.labels.png" &&
        cmp "$results/a.labels.png" "$results/c.labels.png"
}
for precision in f32 f16; do
    check "segment three photos $precision" segment_thrice $precision
done

# A small network, command by command: the tool names the kernel.
if [ "$device" = cuda ] && command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        check "compute-sanitizer $tool" env FPENET_CUDA_GRAPHS=0 "${limited[@]}" \
            compute-sanitizer --tool $tool --error-exitcode 1 "$binary" check \
            --device cuda --reference "$root/tests/data/sigmoid_attention_one_branch"
    done
    sanitizer=yes
else
    sanitizer="no (compute-sanitizer is not installed, or the device is emulated)"
fi

: > "$work/bench.json"
# bench NAME ARGUMENTS...: keeps the figures of `fpenet bench`.
bench() {
    local name=$1
    shift
    if check "$name" "${fpenet[@]}" bench --device "$device" "$@" --json "$work/one.json"; then
        [ -s "$work/bench.json" ] && echo , >> "$work/bench.json"
        cat "$work/one.json" >> "$work/bench.json"
    fi
}
for size in $sizes; do
    for precision in f32 f16; do
        bench "bench $size $precision" \
            --size "$size" --precision $precision --iterations "$iterations"
    done
    bench "bench $size f16, expanded tensors in 8 bits" \
        --size "$size" --precision f16 --expanded bytes --iterations "$iterations"
done
for precision in f32 f16; do
    if [ -z "$quick" ]; then
        bench "bench training 480x360, batch 8, $precision" \
            --train --size 480x360 --batch 8 --precision $precision --iterations 20
    else
        bench "bench training 32x32, batch 1, $precision" \
            --train --size 32x32 --batch 1 --precision $precision --iterations 1 --warmup 0
    fi
done
if [ -n "$data" ]; then
    train=(--epochs 1)
    if [ -n "$quick" ]; then
        train=(--size 32x24 --batch 2 --p 1 --q 1 --val-split none --stop-after-minutes 0.2)
    fi
    for precision in f32 f16; do
        check "train $precision" "${fpenet[@]}" train --data "$data" --out "$work/run-$precision" \
            --device "$device" --precision $precision "${train[@]}"
    done
fi

now=$(date -u +%Y-%m-%dT%H:%M:%SZ)
name=$(printf '%s' "$card" | cut -d, -f1 | tr -cs 'A-Za-z0-9' '-' | sed 's/^-*//;s/-*$//')
mkdir -p "$out"
target=$out/gpu-check-${now%%T*}-$name
{
    printf '{"date": "%s", "device": %s, "nvidia_smi": %s, "commit": %s, "command": %s,\n' "$now" \
        "$(printf '%s' "$card" | quote)" "$(printf '%s' "$smi" | quote)" \
        "$(printf '%s' "$commit" | quote)" "$(printf '%s' "$command_line" | quote)"
    printf '"checks_run": %d, "checks_failed": %d, "sanitizer": %s,\n"bench": [\n' \
        $checks $failed "$(printf '%s' "$sanitizer" | quote)"
    cat "$work/bench.json"
    printf '],\n"checks": [\n'
    cat "$work/checks.json"
    printf ']}\n'
} > "$target.json.partial"
{
    echo "# $card"
    echo
    echo "- date: $now"
    [ -n "$smi" ] && echo "- nvidia-smi (name, driver, memory, highest clock, power limit): $smi"
    echo "- commit: $commit"
    echo "- command: \`$command_line\`"
    echo "- compute-sanitizer: $sanitizer"
    echo "- result: $((checks - failed)) of $checks checks passed"
    echo
    echo "| check | verdict | seconds | last line |"
    echo "| --- | --- | --- | --- |"
    cat "$work/checks.md"
    echo
    cat "$work/logs.md"
} > "$target.md.partial"
mv "$target.json.partial" "$target.json"
mv "$target.md.partial" "$target.md"
echo "$((checks - failed)) of $checks checks passed; wrote $target.json and .md"
[ $failed -eq 0 ]
