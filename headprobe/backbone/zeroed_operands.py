"""Zeroes heads in what an attention operator is given: an oracle for masks, sharing no step with how they are made."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from headprobe.backbone.calls import KINDS
from headprobe.backbone.form import Operator


class ZeroOperands(TorchFunctionMode):
    """Zeroes heads' values before the operator multiplies them, while entered around one call of the layer.

    A product with zeros is zero: of `weights @ values` the first factor is zeroed, of a fused call the values.

    Args:
        operator: The calls.
        keep: `[groups, heads]` bool.
    """

    def __init__(self, operator: Operator, keep: Tensor) -> None:
        super().__init__()
        self.operator, self.keep, self.seen = operator, keep, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if KINDS.get(func) == self.operator.kind:
            call, self.seen = self.seen, self.seen + 1
            place = 2 if self.operator.fused else 0
            if call in self.operator.calls and len(args) > place:
                zeroed = self.operator.zeroed(call, args[place], self.keep)
                args = (*args[:place], zeroed, *args[place + 1 :])
        return func(*args, **(kwargs or {}))
