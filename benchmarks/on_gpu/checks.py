"""The proofs of `headprobe check` with models on the device: one of three families."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import timm
import torch

import headprobe
from benchmarks.on_gpu.part import parser_of, publish

MODELS = {
    "vit_small_patch16_224": {},
    "swin_tiny_patch4_window7_224": {},
    "eva02_tiny_patch14_224": {},
}
TINY = {"vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 3}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check all models and return 1 if a proof fails."""
    options = parser_of("checks", __doc__, folder=False).parse_args(arguments)
    numbers: dict[str, Any] = {}
    for name, own in (TINY if options.tiny else MODELS).items():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, **own).to(options.device).eval()
        began = time.perf_counter()
        report = headprobe.check(model)
        numbers[name] = {
            "passed": report.passed,
            "layers": len(report.layers),
            "seconds": round(time.perf_counter() - began, 2),
            "failures": [str(failure) for failure in report.failures],
        }
        print(report)
        publish(numbers, options.json)
    return int(not all(one["passed"] for one in numbers.values()))


if __name__ == "__main__":
    sys.exit(main())
