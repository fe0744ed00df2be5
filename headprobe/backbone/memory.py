"""Tells an out-of-memory from all other errors that torch raises."""

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether memory has ended, on a GPU or on a CPU, where torch has no class of its own for it."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text
