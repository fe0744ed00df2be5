"""Copies of models, for trials that must not touch the original or need more precision than it has."""

from copy import deepcopy

from torch import nn

from headprobe.errors import UsageError
from headprobe.wording import first_line


def copied(backbone: nn.Module, model: str) -> nn.Module:
    """Return a copy of a model.

    Raises:
        UsageError: It cannot be copied.
    """
    try:
        return deepcopy(backbone)
    except (RuntimeError, TypeError) as error:  # tensors that a graph has made, as of pruned weights, are not copied
        raise UsageError(
            f"model {model!r} cannot be copied, and it is tried on a copy ({first_line(error)}); make pruned or "
            "otherwise computed weights permanent first"
        ) from error


def in_single(backbone: nn.Module, model: str) -> nn.Module:
    """Return the model, or a float32 copy of one in half precision, whose rounding would hide errors."""
    half = next(backbone.parameters()).dtype.itemsize < 4
    return copied(backbone, model).float() if half else backbone
