"""When two outputs count as equal, and how an out-of-memory is told from other errors."""

import torch
from torch import Tensor


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether memory has ended, on a GPU or on a CPU, where torch has no class of its own for it."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in parts of the largest expected number."""
    return float((found - expected).abs().max()) / float(expected.abs().max().clamp(min=1e-12))


ROUNDING = 100  # times the dtype's eps: 1.2e-5 in float32
SAME_SHAPE = 10  # times the dtype's eps, where rows have the same place in a batch of the same shape
COARSEST = 0.05  # in half precision
MOST_ROUNDING = 1e-3


def agree(found: Tensor, expected: Tensor, tolerance: float | None = None) -> bool:
    """Say whether two outputs are equal up to rounding.

    Args:
        found: An output.
        expected: What it is to be.
        tolerance: Largest difference relative to the largest expected number; without it that of their dtype.
    """
    relative = min(ROUNDING * torch.finfo(expected.dtype).eps, COARSEST) if tolerance is None else tolerance
    allowed = relative * float(expected.abs().max().clamp(min=1e-6))
    return found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all())
