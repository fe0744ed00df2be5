"""Watches a model run: the calls that compute attention, and how one forward pass goes through the modules.

`WatchCalls` hands over every call that attention can be made of; masks and taps use it too. `recording` notes in a
`Trace` which modules a forward pass enters, in which order, and the calls that each attention layer makes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headprobe.backbone.heads.sites import Site, class_path
from headprobe.errors import UsageError

CallKind = Literal["fused", "product", "softmax", "whole"]

KINDS: dict[Callable[..., Any], CallKind] = {
    F.scaled_dot_product_attention: "fused",
    torch.ops.aten.scaled_dot_product_attention: "fused",
    torch.ops.aten.scaled_dot_product_attention.default: "fused",
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
    torch.special.softmax: "softmax",
    F.multi_head_attention_forward: "whole",
}
"""The functions that attention can be made of; the last computes heads and projection in one call."""


Watch = Callable[[CallKind, tuple[Any, ...], dict[str, Any], Tensor], Tensor]
"""Takes a call's kind, arguments, keyword arguments and result; returns what the model goes on with.

The result is a tensor, and of a call of the kind `whole` a tuple.
"""


class WatchCalls(TorchFunctionMode):
    """Hands every call of `KINDS` to `watch` while it is entered; fused attention stays on."""

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
    """Enter a mode inside each of `modules`, and nowhere else because it costs time, while the context is open.

    Args:
        modules: None contains another.
        watch_of: Makes the mode for a module's number, each time that the module is entered.
    """
    entered = ExitStack()
    with ExitStack() as stack:
        # a forward pass that raises leaves its module without running the hook that leaves the mode
        stack.callback(entered.close)
        for number, module in enumerate(modules):

            def enter(*_: object, number: int = number) -> None:
                entered.enter_context(watch_of(number))

            def leave(*_: object) -> None:
                entered.close()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


@dataclass(frozen=True)
class Call:
    """One call that attention is made of.

    Attributes:
        kind: What was called.
        shape: Shape of its result; empty where that is no tensor.
        operands: How many numbers each tensor holds that it was given.
        inside: Names of the modules that were running, the outermost first.
    """

    kind: CallKind
    shape: torch.Size
    operands: tuple[int, ...] = ()
    inside: tuple[str, ...] = ()


@dataclass
class Trace:
    """How one forward pass went.

    Attributes:
        order: Names of the attention layers in the order of their calls.
        entered: How often each of them was called.
        shapes: The shape of each layer's concatenated heads.
        calls: The calls of each layer before its heads were concatenated.
        late: The calls of each layer afterwards.
        ran: Modules that were called.
        block_shapes: The shape of every module's first argument.
        open_layers: Attention layers that are running.
        open_modules: Modules that are running.
        stray: Such calls outside every layer, in their order.
    """

    order: list[str] = field(default_factory=list)
    entered: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    block_shapes: dict[str, torch.Size] = field(default_factory=dict)
    open_layers: list[str] = field(default_factory=list)
    open_modules: list[str] = field(default_factory=list)
    stray: list[Call] = field(default_factory=list)
    late: dict[str, list[Call]] = field(default_factory=dict)
    ran: dict[str, None] = field(default_factory=dict)

    def note(self, kind: CallKind, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Note one call under the innermost layer that is running, or as stray."""
        shape = result.shape if isinstance(result, Tensor) else torch.Size()
        call = Call(kind, shape, tuple(_sizes((*args, *kwargs.values()))), tuple(self.open_modules))
        if not self.open_layers:
            self.stray.append(call)
        elif self.open_layers[-1] not in self.shapes:
            self.calls[self.open_layers[-1]].append(call)
        else:
            self.late.setdefault(self.open_layers[-1], []).append(call)
        return result

    @property
    def late_attention(self) -> list[str]:
        """Layers that attend again after their heads were concatenated."""
        return [layer for layer, calls in self.late.items() if _is_fused(calls) or _attending(calls)]

    @property
    def stray_attention(self) -> list[str]:
        """Modules outside every layer that call fused attention, or attend with several heads."""
        return [module for module, (fused, softmaxes) in self._stray().items() if fused or _has_heads(softmaxes)]

    @property
    def stray_headless(self) -> list[str]:
        """Modules outside every layer that attend by a softmax and a matrix product, without several heads."""
        with_heads = self.stray_attention
        return [module for module in self._stray() if module not in with_heads]

    @property
    def stray_products(self) -> list[str]:
        """Modules outside every layer that multiply matrices twice or more: queries by keys, weights by values."""
        products = Counter(call.inside[-1] for call in self.stray if call.kind == "product" and call.inside)
        return [module for module, times in products.items() if times > 1]

    def _stray(self) -> dict[str, tuple[bool, list[Call]]]:
        """Return the modules outside every layer that attend: whether in one call, and their calls of softmax."""
        found: dict[str, tuple[bool, list[Call]]] = {}
        own: dict[str, list[Call]] = {}  # the calls of each module itself
        for at, call in enumerate(self.stray):
            module = call.inside[-1] if call.inside else ""
            own.setdefault(module, []).append(call)
            if call.kind == "softmax":
                # a module of its own may compute the softmax, or the product behind it
                across = _common(call, self.stray[at + 1 :])
                if across is not None and across != module:
                    found.setdefault(across, (False, []))[1].append(call)
        for module, calls in own.items():
            if _is_fused(calls) or _attending(calls):
                before = found.get(module, (False, []))[1]
                found[module] = (_is_fused(calls), [*before, *_attending(calls)])
        return found


def _sizes(values: Iterable[Any]) -> Iterator[int]:
    """Return how many numbers each tensor holds, also those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.numel()
        elif isinstance(value, list | tuple):
            yield from _sizes(value)


def _common(softmax: Call, later: Sequence[Call]) -> str | None:
    """Return the innermost module around a softmax and the next product, None where that takes other numbers."""
    product = next((call for call in later if call.kind == "product"), None)
    if product is None or softmax.shape.numel() not in product.operands:
        return None
    names = [one for one, other in zip(softmax.inside, product.inside, strict=False) if one == other]
    return names[-1] if names else ""


def _is_fused(calls: list[Call]) -> bool:
    return any(call.kind in ("fused", "whole") for call in calls)


def _attending(calls: list[Call]) -> list[Call]:
    """Return the calls of softmax that a matrix product follows."""
    kinds = [call.kind for call in calls]
    return [call for at, call in enumerate(calls) if call.kind == "softmax" and "product" in kinds[at:]]


def _has_heads(calls: list[Call]) -> bool:
    """Return whether weights have several heads: `[rows, heads, queries, keys]`, or windows on one axis more."""
    return any(len(call.shape) > 3 and call.shape[1] > 1 for call in calls)


@contextmanager
def recording(backbone: nn.Module, sites: Mapping[str, Site], trace: Trace) -> Iterator[None]:
    """Fill `trace` while the context is open.

    Args:
        backbone: The model.
        sites: How the heads of its attention modules are reached, by the modules' names.
        trace: Is filled.
    """
    with ExitStack() as stack:
        for name, module in backbone.named_modules():
            for handle in _watch(backbone, name, module, sites.get(name), trace):
                stack.callback(handle.remove)
        stack.enter_context(WatchCalls(trace.note))
        yield


def _watch(
    backbone: nn.Module, name: str, module: nn.Module, site: Site | None, trace: Trace
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hook one module so that its calls are noted in `trace`."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        trace.open_modules.append(name)
        trace.ran[name] = None
        if site is not None:
            trace.order.extend([] if name in trace.entered else [name])
            trace.entered[name] = trace.entered.get(name, 0) + 1
            trace.calls.setdefault(name, [])
            trace.open_layers.append(name)
        if args and isinstance(args[0], Tensor):
            trace.block_shapes.setdefault(name, args[0].shape)

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        trace.open_modules.pop()
        if site is not None:
            trace.open_layers.pop()

    def at_point(_: nn.Module, args: tuple[Any, ...]) -> None:
        if not args:
            raise UsageError(
                f"attention module {name!r} ({class_path(module)}) hands its heads on as a keyword argument, where "
                "they cannot be masked; make it a positional one"
            )
        trace.shapes.setdefault(name, args[0].shape)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    if site is not None:
        point = backbone.get_submodule(point_of(module, name, site))
        handles.append(point.register_forward_pre_hook(at_point))
    return handles


def point_of(module: nn.Module, name: str, site: Site) -> str:
    """Return the qualified name of an attention module's point."""
    for point in site.points:
        if isinstance(getattr(module, point, None), nn.Module):
            return f"{name}.{point}" if name else point
    raise UsageError(
        f"attention module {name!r} ({class_path(module)}) has none of the sub-modules {', '.join(site.points)} "
        "that its class has in the timm releases that headprobe supports; install a supported timm"
    )
