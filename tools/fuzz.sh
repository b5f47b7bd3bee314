#!/usr/bin/env bash
# Runs every fuzz target for a bounded time: tools/fuzz.sh [SECONDS] [TARGET..], by default 60 s
# each. A crash stops the script with exit code 1; its input is under fuzz/artifacts. What it
# finds on the way lies under fuzz/target/found and is where the next run goes on.
#
# Needs cargo-fuzz (cargo install cargo-fuzz) and a C++ compiler. cargo-fuzz asks for unstable
# compiler options, which a stable toolchain takes with RUSTC_BOOTSTRAP=1. SANITIZER=none leaves
# out the address sanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-60}
shift || true
if (($# == 0)); then
    set -- $(cargo fuzz list)
fi
export RUSTC_BOOTSTRAP=1
for target in "$@"; do
    found=fuzz/target/found/$target
    mkdir -p "$found"
    # A photo may ask for 4 GiB (src/segment/decode.rs), nothing else for more than 64 MiB.
    limit=$([[ $target == image ]] && echo 5000 || echo 64)
    echo "== $target, $seconds s"
    cargo fuzz run --sanitizer "${SANITIZER:-address}" "$target" "$found" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -timeout=20 -malloc_limit_mb="$limit" -rss_limit_mb=6000 \
        -max_len=65536 -print_final_stats=1
done
