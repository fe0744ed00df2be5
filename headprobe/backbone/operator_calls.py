"""Sees the calls that make up attention: the fused operator, matrix products and softmax."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CallKind = Literal["fused", "product", "softmax"]


KINDS: dict[Callable[..., Any], CallKind] = {
    F.scaled_dot_product_attention: "fused",
    torch.matmul: "product",
    Tensor.matmul: "product",
    Tensor.__matmul__: "product",
    Tensor.__rmatmul__: "product",
    torch.bmm: "product",
    Tensor.bmm: "product",
    torch.einsum: "product",
    F.softmax: "softmax",
    torch.softmax: "softmax",
    Tensor.softmax: "softmax",
}


Watch = Callable[[CallKind, tuple[Any, ...], dict[str, Any], Tensor], Tensor]
"""Is given a call's kind, arguments, keyword arguments and result, and returns what the model is to go on with."""


class WatchCalls(TorchFunctionMode):
    """Shows every such call to `watch` while it is entered; fused attention stays on."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = KINDS.get(func)
        return result if kind is None else self.watch(kind, args, kwargs or {}, result)


@contextmanager
def inside(modules: Sequence[nn.Module], watch_of: Callable[[int], TorchFunctionMode]) -> Iterator[None]:
    """Hold a mode inside each of `modules` only, for it costs time, while the context is open.

    Args:
        modules: Do not contain each other.
        watch_of: Makes the mode for a module's number, each time that the module is entered.
    """
    entered = ExitStack()
    with ExitStack() as stack:
        stack.callback(entered.close)  # a forward pass that raises leaves its module without saying so
        for number, module in enumerate(modules):

            def enter(*_: object, number: int = number) -> None:
                entered.enter_context(watch_of(number))

            def leave(*_: object) -> None:
                entered.close()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield
