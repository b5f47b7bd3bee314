#!/usr/bin/env bash
# What other tools read of ours, judged by them: ONNX files by onnx.checker and ONNX Runtime, the figures
# of `fpenet eval` by cityscapesScripts on the PNGs of `fpenet export-predictions`. Part of CI.
#
# Needs `cargo build --release` and Python 3.11 or newer with pip; the packages go to
# target/exchange-python, no GPU, no torch.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=target/exchange-python
pip=(python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --target "$packages")
if [[ ! -f $packages/complete ]]; then
    rm -rf "$packages"
    "${pip[@]}" $(grep -E '^(numpy|onnx|onnxruntime|pillow)==' tools/requirements.txt)
    # Without what it asks for: a back-port of `typing` among it hides Python's own.
    "${pip[@]}" --upgrade --no-deps cityscapesScripts==2.3.0 pyquaternion appdirs coloredlogs humanfriendly tqdm
    touch "$packages/complete"
fi
export PYTHONPATH=$packages
fpenet=${1:-target/release/fpenet}
python3 tools/check_onnx.py --fpenet "$fpenet"
python3 tools/check_cityscapes.py --fpenet "$fpenet"
