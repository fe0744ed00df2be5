"""When two outputs count as equal, and which errors are an out-of-memory."""

import torch
from torch import Tensor


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether memory has ended; on a CPU torch raises no class of its own for it, so the text decides."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a part of the largest expected number."""
    return float((found - expected).abs().max()) / float(expected.abs().max().clamp(min=1e-12))


ROUNDING = 100  # times the dtype's eps: 1.2e-5 in float32
SAME_SHAPE = 10  # times the dtype's eps, where a row has the same place in a batch of the same shape
COARSEST = 0.05  # in half precision
MOST_ROUNDING = 1e-3  # relative to the largest number; a larger difference is an error, whatever the reason


def agree(found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Say whether two outputs are equal up to rounding.

    Args:
        found: An output.
        expected: What it should be.
        tolerance: Largest difference relative to the largest expected number; without it `ROUNDING` of the dtype.
    """
    part = min(ROUNDING * torch.finfo(expected.dtype).eps, COARSEST) if tolerance is None else tolerance
    allowed = part * float(expected.abs().max().clamp(min=1e-6))
    return found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all())
