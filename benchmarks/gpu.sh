#!/usr/bin/env bash
# Correctness, then speed of a sweep, on a machine with one GPU and no network: bash benchmarks/gpu.sh
# Needs Python 3.12, torch 2.11, torchvision, timm, lightning and torchmetrics, and this repository's files; no weights, no data.
# Options are those of `python -m benchmarks.gpu --help`; PYTHON names the interpreter. On a CPU, in seconds:
#   bash benchmarks/gpu.sh --device cpu --tiny
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
