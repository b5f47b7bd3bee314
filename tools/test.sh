#!/usr/bin/env bash
# The whole check: format, lints, documentation, tests. What CI runs, and what to run before a
# commit. Needs Rust and a C/C++ compiler; no GPU, no nvcc, no Python. Builds once, in release.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo fmt --check
cargo clippy --release --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps
cargo test --release "$@"
