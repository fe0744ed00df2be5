"""One attention module alone: called again with what it was given in a forward pass, its heads masked in several ways.

Each layer is judged by its own output, so that a fault shows at its layer, whatever later layers make of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from headprobe.backbone.capture.operator_record import AppliedWeights, WatchOperator
from headprobe.backbone.heads.layout import AttentionLayer, HeadLayout, Operator
from headprobe.backbone.heads.trace import KINDS
from headprobe.backbone.masking.ablation import ZeroHeads, ablating
from headprobe.errors import UsageError


@dataclass(frozen=True)
class LayerBench:
    """An attention module and its arguments.

    Attributes:
        layer: Which layer it is.
        module: The attention module.
        point: Where its heads are concatenated.
        projection: The weights that the heads enter next inside the module `[out, channels, ...]`, None without any.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    layer: AttentionLayer
    module: nn.Module
    point: nn.Module
    projection: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def output(self) -> Tensor:
        """Call the module and return what it gives, of several tensors the first."""
        return first_tensor(self.module(*self.args, **self.kwargs))

    def masked(self, keep: Tensor) -> Tensor:
        """Return the output with heads masked as a run masks them.

        Args:
            keep: `[groups, heads]` bool, True = keep.
        """
        with self._ablating(keep):
            return self.output()

    def slots_masked(self, keep: Tensor) -> Tensor:
        """Return the output with heads masked where they are concatenated."""
        return replace(self, layer=replace(self.layer, semantics="slot")).masked(keep)

    def slots(self, keep: Tensor) -> Tensor:
        """Return what the head-concat point is given, with heads masked there, by head; see `heads_out`."""
        with replace(self, layer=replace(self.layer, semantics="slot"))._ablating(keep):
            return self.heads_out()

    @contextmanager
    def _ablating(self, keep: Tensor) -> Iterator[None]:
        """Mask heads by the very code that a run uses, in a model of this one layer."""
        point = self.layer.point.removeprefix(f"{self.layer.name}.") if self.layer.name else self.layer.point
        alone = replace(self.layer, name="", point=point)
        with ablating(self.module, HeadLayout(self.layer.name, (alone,), 0, (0, 0, 0)), lambda _: keep):
            yield

    @property
    def _operator(self) -> Operator:
        if self.layer.operator is None:
            raise ValueError(f"the attention operator of {self.layer.name!r} is not known")
        return self.layer.operator

    def operator_zeroed(self, keep: Tensor) -> Tensor:
        """Return the output with heads zeroed in what the attention operator gives."""
        with ZeroHeads(self._operator, keep):
            return self.output()

    def operands_zeroed(self, keep: Tensor) -> Tensor:
        """Return the output with heads zeroed in what the attention operator is given."""
        with ZeroOperands(self._operator, keep):
            return self.output()

    def columns_zeroed(self, keep: Tensor) -> Tensor:
        """Return the output with heads' columns of the projection zeroed.

        Args:
            keep: `[heads]` bool, True = keep.
        """
        if self.projection is None:
            raise ValueError(f"{self.layer.name!r} has no output projection of its own")
        weight, channels = self.projection.data, self.layer.channels
        saved = weight.clone()
        try:
            weight[:, : channels.channels][:, ~channels.of_heads(keep)] = 0
            return self.output()
        finally:
            weight.copy_(saved)

    def silent_heads(self) -> list[int]:
        """Return the heads whose columns of the projection are all zero."""
        if self.projection is None:
            return []
        channels = self.layer.channels
        silent = (self.projection.detach()[:, : channels.channels] == 0).transpose(0, 1).flatten(1).all(dim=1)
        return [
            head
            for head in range(channels.heads)
            if bool(silent[channels.of_heads(torch.arange(channels.heads, device=silent.device) == head)].all())
        ]

    def heads_out(self, keep: Tensor | None = None) -> Tensor:
        """Return what enters the head-concat point, by head `[rows, tokens, heads, head_dim]`.

        Args:
            keep: `[groups, heads]` bool; the others are zeroed in what the attention operator gives.
        """
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(self.layer.channels.split(args[0]))

        with _pre_hook(self.point, hook):
            if keep is None:
                self.output()
            else:
                self.operator_zeroed(keep)
        return seen[0]

    def applied(self) -> list[AppliedWeights]:
        """Return the attention weights, what they were applied to, and what came of it."""
        if self.layer.operator is None:
            return []
        see = WatchOperator(self.layer.operator)
        with see:
            self.output()
        return see.applied()


@contextmanager
def _pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def layer_benches(backbone: nn.Module, layout: HeadLayout, images: Tensor) -> list[LayerBench]:
    """Run `images` through the model and return every layer with what it was given."""
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(layout.layers):

            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
                given[number] = (_copied(args), {name: _copy(value) for name, value in kwargs.items()})

            module = backbone.get_submodule(layer.name)
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        backbone(images)
    if len(given) < len(layout.layers):
        raise UsageError(
            f"a copy of model {layout.model!r} does not call its own modules: a forward of it was replaced by a "
            "function that holds the original; subclass the model instead"
        )
    return [
        LayerBench(
            layer,
            backbone.get_submodule(layer.name),
            backbone.get_submodule(layer.point),
            _projection(backbone, layer),
            *given[number],
        )
        for number, layer in enumerate(layout.layers)
    ]


def first_tensor(output: Any) -> Tensor:
    """Return a module's output, of several the first."""
    if isinstance(output, Tensor):
        return output
    found: Tensor = next(part for part in output if isinstance(part, Tensor))
    return found


def _copied(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_copy(value) for value in values)


def _copy(value: Any) -> Any:
    """Return a copy that later modules cannot write into."""
    return value.clone() if isinstance(value, Tensor) else value


def _projection(backbone: nn.Module, layer: AttentionLayer) -> Tensor | None:
    """Return the weights of the one linear layer or convolution in what takes the heads on, if they say all of it."""
    try:
        behind = backbone.get_submodule(layer.projection)
    except AttributeError:
        return None
    linear = [part for part in behind.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    if len(linear) != 1 or is_parametrized(linear[0]):  # low-rank updates, or weights that are made anew in each pass
        return None
    (part,) = linear
    whole = isinstance(part, nn.Linear) or part.groups == 1
    return part.weight if whole and part.weight.shape[1] >= layer.channels.channels else None


# -- Zeroes heads in what an attention operator is given: an oracle for masks, sharing no step with how they are made --


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
