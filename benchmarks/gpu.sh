#!/usr/bin/env bash
# Correctness, then speed of a sweep, on a machine with one GPU and no network: bash benchmarks/gpu.sh
# Needs Python 3.12, torch 2.11, torchvision, timm, lightning and torchmetrics, and this repository's files; no weights, no data.
# Options are those of `python -m benchmarks.gpu --help`; PYTHON names the interpreter. On a CPU, in seconds:
#   bash benchmarks/gpu.sh --device cpu --tiny
# Everything that a visit to a GPU should answer, in seven minutes (also needs headprobe's other packages):
#   bash benchmarks/gpu.sh all --json gpu.json
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
module=benchmarks.gpu
if [ "${1:-}" = all ]; then module=benchmarks.on_gpu && shift; fi
exec "${PYTHON:-python3}" -m "$module" "$@"
