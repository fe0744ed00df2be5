"""One attention module alone: called again on its arguments from a forward pass, with its heads masked in several ways.

One way is the code of a run; the others are its oracles: heads zeroed in the operator's output or in its operands, or
their columns of the projection zeroed. Each layer is compared by its own output, so that a fault shows at its layer,
whatever later layers make of it.
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
from headprobe.backbone.gradients import with_history
from headprobe.backbone.heads.layout import AttentionLayer, HeadLayout, Operator
from headprobe.backbone.heads.trace import KINDS
from headprobe.backbone.masking.ablation import ZeroHeads, ablating
from headprobe.backbone.sandbox import is_plain
from headprobe.errors import UsageError


@dataclass(frozen=True)
class LayerBench:
    """An attention module and its arguments.

    Attributes:
        layer: The layer's description.
        module: The attention module.
        point: The module at its point.
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
        """Call the module and return its output; the first tensor of several."""
        return first_tensor(self.module(*self.args, **self.kwargs))

    def masked(self, keep: Tensor) -> Tensor:
        """Return the output with heads masked as a run masks them.

        Args:
            keep: `[groups, heads]` bool, True = keep.
        """
        with self._ablating(keep):
            return self.output()

    def slots_masked(self, keep: Tensor) -> Tensor:
        """Return the output with heads masked at the point.

        Args:
            keep: `[groups, heads]` bool, True = keep.
        """
        return replace(self, layer=replace(self.layer, semantics="slot")).masked(keep)

    def slots(self, keep: Tensor) -> Tensor:
        """Return the point's input by head, with heads masked there; see `heads_out`.

        Args:
            keep: `[groups, heads]` bool, True = keep.
        """
        with replace(self, layer=replace(self.layer, semantics="slot"))._ablating(keep):
            return self.heads_out()

    @contextmanager
    def _ablating(self, keep: Tensor) -> Iterator[None]:
        """Mask heads by the very code that a run uses, in a model of this one layer."""
        # the attention module is the whole model, so the name of its point begins there
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
        """Return the output with heads zeroed in the attention operator's output.

        Args:
            keep: `[groups, heads]` bool, True = keep.
        """
        with ZeroHeads(self._operator, keep):
            return self.output()

    def operands_zeroed(self, keep: Tensor) -> Tensor:
        """Return the output with heads zeroed in the attention operator's operands.

        Args:
            keep: `[groups, heads]` bool, True = keep.
        """
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
            # [out, channels of heads, ...], indexed by [channels of heads]
            weight[:, : channels.channels][:, ~channels.of_heads(keep)] = 0
            return self.output()
        finally:
            weight.copy_(saved)

    def silent_heads(self) -> list[int]:
        """Return the heads with nothing but zeros in their columns of the projection."""
        if self.projection is None:
            return []
        channels = self.layer.channels
        zero = self.projection.detach()[:, : channels.channels] == 0  # [out, channels of heads, ...]
        zero_columns = zero.transpose(0, 1).flatten(1).all(dim=1)  # [channels of heads]

        silent = []
        numbers = torch.arange(channels.heads, device=zero_columns.device)
        for head in range(channels.heads):
            own = channels.of_heads(numbers == head)  # [channels of heads]
            if bool(zero_columns[own].all()):
                silent.append(head)
        return silent

    def heads_out(self, keep: Tensor | None = None) -> Tensor:
        """Return the point's input by head `[rows, tokens, heads, head_dim]`.

        Args:
            keep: `[groups, heads]` bool; the other heads are zeroed in the attention operator's output.
        """
        inputs: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.append(self.layer.channels.split(args[0].detach()))

        with _pre_hook(self.point, hook):
            if keep is None:
                self.output()
            else:
                self.operator_zeroed(keep)
        return inputs[0]

    def applied(self) -> list[AppliedWeights]:
        """Return the attention weights, the values and the operator's output, one entry for each map of the layer."""
        if self.layer.operator is None:
            return []
        watch = WatchOperator(self.layer.operator)
        with watch:
            self.output()
        return watch.applied()


class ZeroOperands(TorchFunctionMode):
    """Zeroes heads in the operator's operands, while entered around one call of the layer.

    An oracle that shares no step with how masks are applied: a product with zeros is zero. In `weights @ values` the
    first factor is zeroed, in a fused call the values.

    Args:
        operator: The calls.
        keep: `[groups, heads]` bool, True = keep.
    """

    def __init__(self, operator: Operator, keep: Tensor) -> None:
        super().__init__()
        self.operator, self.keep, self.next_call = operator, keep, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if KINDS.get(func) == self.operator.kind:
            call, self.next_call = self.next_call, self.next_call + 1
            place = 2 if self.operator.fused else 0  # of the operand among the arguments
            if call in self.operator.calls and len(args) > place:
                zeroed = self.operator.zeroed(call, args[place], self.keep)
                args = (*args[:place], zeroed, *args[place + 1 :])
        return func(*args, **(kwargs or {}))


@contextmanager
def _pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def layer_benches(backbone: nn.Module, layout: HeadLayout, images: Tensor) -> tuple[list[LayerBench], Tensor]:
    """Run `images` through the model; return every layer with its arguments, and the model's outputs.

    Raises:
        UsageError: Some layers were not called: the model is a copy that calls modules of its original.
    """
    given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    with ExitStack() as stack:
        for number, layer in enumerate(layout.layers):

            def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
                given[number] = (_copied(args), {name: _copy(value) for name, value in kwargs.items()})

            module = backbone.get_submodule(layer.name)
            stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        outputs: Tensor = backbone(images)

    if len(given) < len(layout.layers):
        raise UsageError(
            f"a copy of model {layout.model!r} does not call its own modules: a forward of it was replaced by a "
            "function that holds the original; subclass the model instead"
        )

    benches = []
    for number, layer in enumerate(layout.layers):
        module, point = backbone.get_submodule(layer.name), backbone.get_submodule(layer.point)
        benches.append(LayerBench(layer, module, point, _projection(backbone, layer), *given[number]))
    return benches, outputs


def first_tensor(output: Any) -> Tensor:
    """Return a module's output, the first tensor of several, without its history of gradients."""
    found: Tensor = output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))
    return found.detach()


def _copied(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_copy(value) for value in values)


def _copy(value: Any) -> Any:
    """Return a copy that later modules cannot write into; it needs gradients where the original does."""
    if not isinstance(value, Tensor):
        return value
    return with_history(value) if value.requires_grad else value.clone()


def _projection(backbone: nn.Module, layer: AttentionLayer) -> Tensor | None:
    """Return the weights that take the heads on; None unless one linear layer or convolution does all of it."""
    try:
        behind = backbone.get_submodule(layer.projection)
    except AttributeError:
        return None
    linear = [part for part in behind.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    if len(linear) != 1 or is_parametrized(linear[0]):  # low-rank updates, or weights computed anew in each pass
        return None
    (part,) = linear
    whole = isinstance(part, nn.Linear) or part.groups == 1
    return part.weight if whole and is_plain(part.weight) and part.weight.shape[1] >= layer.channels.channels else None
