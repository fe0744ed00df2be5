"""Many masks in one forward pass: the batch grows with depth, each mask joining at its first masked layer.

A mask whose first masked layer is l changes nothing before l, so up to there the unmasked rows (the trunk) stand for
it. A pre-hook on the module around layer l appends one copy of the trunk's rows per joining mask; from there on every
row carries its own mask. Each module runs once; nothing is cached and nothing is run again. Which module that is, is
decided by trial (`find_joins`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.ablation import HookCount, ablating, masked_logits
from headprobe.backbone.heads import HeadLayout, evaluating, example_images
from headprobe.backbone.rows import RowPlan
from headprobe.errors import RunError, UsageError

Key = int | str
"""A positional or keyword argument of a module."""


@dataclass(frozen=True)
class Join:
    """The module at whose input a layer's masks join.

    Attributes:
        module: Its qualified name, empty for the whole model.
        place: When it is called, counted over all modules of one forward pass.
        batched: Its tensor arguments that carry the batch, with their rows per image.
    """

    module: str
    place: int
    batched: tuple[tuple[Key, int], ...]


class GrowingPass:
    """Runs a backbone on images under many head masks at once.

    Use it as a context manager: hooks live only inside.

    Args:
        backbone: The model that `layout` describes.
        layout: Its attention layers.
        joins: For every layer where its masks join, from `find_joins`.
        keep: `[masks, layers, max heads]` bool, True = keep.
    """

    def __init__(self, backbone: nn.Module, layout: HeadLayout, joins: Sequence[Join], keep: Tensor) -> None:
        self.backbone, self.layout, self.joins = backbone, layout, tuple(joins)
        self.keep = keep
        masked = (~keep).any(dim=2).cpu()
        self.first_layers = [int(row.int().argmax()) if bool(row.any()) else None for row in masked]
        self._masked = masked.tolist()
        self._rows = _Rows(0, (), 0)
        self._stack = ExitStack()
        self._count = HookCount(len(layout.layers))

    @property
    def join_places(self) -> list[int | None]:
        """For every mask the place of its join point in execution order, None for a mask without heads."""
        return [None if layer is None else self.joins[layer].place for layer in self.first_layers]

    def plan(self, batch_size: int, budget: int) -> RowPlan:
        """Plan the forward passes of batches of `batch_size` images within `budget` rows."""
        return RowPlan.build(self.join_places, batch_size, budget)

    def __enter__(self) -> "GrowingPass":
        with ExitStack() as stack:
            self._count = stack.enter_context(ablating(self.backbone, self.layout, self._keep_of_layer))
            for join in {join.module: join for join in self.joins}.values():
                module = self.backbone.get_submodule(join.module)
                handle = module.register_forward_pre_hook(self._join_hook(join), with_kwargs=True)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def logits(self, images: Tensor, plan: RowPlan) -> Tensor:
        """Return logits `[1 + masks, images, classes]`, the baseline first, of at most `plan.images` images.

        The baseline is the trunk of the first chunk, one and the same for every mask.

        Raises:
            RunError: A mask did not join, or a hook did not fire exactly once.
        """
        out: Tensor | None = None
        for chunk in plan.chunks:
            by_mask = self._forward(images, chunk)
            if out is None:
                out = by_mask.new_empty(1 + len(self.first_layers), *by_mask.shape[1:])
                out[0] = by_mask[0]
            for place, mask in enumerate(chunk):
                out[1 + mask] = by_mask[1 + place]
        if out is None:
            raise RunError("the row plan has no chunk")
        for mask in plan.idle:
            out[1 + mask] = out[0]
        return out

    def _forward(self, images: Tensor, chunk: tuple[int, ...]) -> Tensor:
        """Run one chunk and return `[1 + masks of the chunk, images, classes]`."""
        self._rows = _Rows(len(images), chunk, joined=0)
        try:
            logits: Tensor = self.backbone(images)
        finally:
            joined, self._rows = self._rows.joined, _Rows(0, (), 0)
        self._count.check(self.layout)
        if joined != len(chunk) or len(logits) != len(images) * (1 + joined):
            raise RunError(f"{joined} of {len(chunk)} masks joined the forward pass of {self.layout.model!r}")
        return logits.reshape(1 + joined, len(images), *logits.shape[1:])

    def _keep_of_layer(self, layer: int) -> Tensor | None:
        """Return which heads of `layer` the trunk and the masks joined so far keep."""
        joined, waiting = self._rows.chunk[: self._rows.joined], self._rows.chunk[self._rows.joined :]
        if any(self._masked[mask][layer] for mask in waiting):
            raise RunError(f"a mask of {self.layout.layers[layer].name!r} of {self.layout.model!r} joined too late")
        if not any(self._masked[mask][layer] for mask in joined):
            return None
        masks = self.keep[list(joined), layer]
        return torch.cat([torch.ones_like(masks[:1]), masks])

    def _join_hook(self, join: Join) -> Callable[..., Any]:
        """Build the pre-hook that appends the trunk's rows for the masks joining at `join`."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            rows = self._rows
            joining = 0
            for mask in rows.chunk[rows.joined :]:
                layer = self.first_layers[mask]
                if layer is None or self.joins[layer].module != join.module:
                    break
                joining += 1
            if not joining:
                return None
            rows.joined += joining
            return _grown(args, kwargs, join, rows.images, joining)

        return hook


@dataclass
class _Rows:
    """What the rows of the forward pass under way are."""

    images: int
    chunk: tuple[int, ...]
    joined: int


def _grown(
    args: tuple[Any, ...], kwargs: dict[str, Any], join: Join, images: int, joining: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with the trunk's rows appended `joining` times wherever they carry the batch."""
    positional, named = list(args), dict(kwargs)
    for key, rows_per_image in join.batched:
        store: Any = positional if isinstance(key, int) else named
        tensor = store[key]
        trunk = tensor[: images * rows_per_image]
        store[key] = torch.cat([tensor, trunk.repeat(joining, *[1] * (tensor.dim() - 1))])
    return tuple(positional), named


def find_joins(backbone: nn.Module, layout: HeadLayout) -> tuple[Join, ...]:
    """Find, for every layer, the innermost module at whose input masks may join, proven by trial.

    Candidates go outward from the module around the attention layer to the whole model. Each is held to plain forward
    passes with one mask each on noise; a layer whose logits differ moves one candidate outward.

    Raises:
        UsageError: Not even joining at the model's input reproduces plain forward passes: rows of a batch influence
            each other.
    """
    with evaluating(backbone), torch.inference_mode():
        calls = [_record_calls(backbone, layout, images) for images in (2, 3)]
        candidates = [_candidates(layout, number, *calls) for number in range(len(layout.layers))]
        keep = trial_masks(layout, next(backbone.parameters()).device)
        images = example_images(backbone, layout.input_size, 2, seed=1)
        expected = torch.stack([masked_logits(backbone, layout, images, mask) for mask in keep])
        return tuple(_settle(backbone, layout, candidates, keep, images, expected))


def trial_masks(layout: HeadLayout, device: torch.device, seed: int = 0) -> Tensor:
    """Return seeded masks `[layers, layers, max heads]`: mask l begins at layer l and hits half of the later heads."""
    layers, most = len(layout.layers), max(layout.heads_per_layer)
    keep = torch.rand(layers, layers, most, generator=torch.Generator().manual_seed(seed)) < 0.5
    for number, heads in enumerate(layout.heads_per_layer):
        keep[number, :number] = True
        keep[number, number, number % heads] = False
        keep[:, number, heads:] = True
    return keep.to(device)


def _settle(
    backbone: nn.Module,
    layout: HeadLayout,
    candidates: list[list[Join]],
    keep: Tensor,
    images: Tensor,
    expected: Tensor,
) -> list[Join]:
    """Move layers outward until every mask's logits agree with its plain forward pass."""
    chosen = [0] * len(candidates)
    while True:
        joins = [options[choice] for options, choice in zip(candidates, chosen, strict=True)]
        wrong = _disagreeing(backbone, layout, joins, keep, images, expected)
        if not wrong:
            return joins
        for layer in wrong:
            chosen[layer] += 1
            if chosen[layer] >= len(candidates[layer]):
                raise UsageError(
                    f"model {layout.model!r}: rows of one batch influence each other at {layout.layers[layer].name!r}, "
                    "so several masks cannot share a forward pass"
                )


def _disagreeing(
    backbone: nn.Module, layout: HeadLayout, joins: list[Join], keep: Tensor, images: Tensor, expected: Tensor
) -> list[int]:
    """Return the layers whose mask gives other logits in the growing pass than in its plain forward pass."""
    everyone = list(range(len(joins)))
    found = _growing_logits(backbone, layout, joins, keep, images)
    if found is not None:
        return [layer for layer in everyone if not agree(found[1 + layer], expected[layer])]
    wrong = []  # a join with impossible shapes spoils the whole pass: try the layers one by one
    for layer in everyone:
        alone = _growing_logits(backbone, layout, joins, keep[layer : layer + 1], images)
        if alone is None or not agree(alone[1], expected[layer]):
            wrong.append(layer)
    return wrong


def _growing_logits(
    backbone: nn.Module, layout: HeadLayout, joins: list[Join], keep: Tensor, images: Tensor
) -> Tensor | None:
    """Return the growing pass's logits, or None where these joins give impossible shapes."""
    try:
        with GrowingPass(backbone, layout, joins, keep) as growing:
            return growing.logits(images, growing.plan(len(images), len(images) * (1 + len(keep))))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # what torch and timm raise for rows that do not fit
        return None


def agree(found: Tensor, expected: Tensor) -> bool:
    """Say whether two sets of logits are equal up to the rounding that another batch shape brings in their dtype."""
    tolerance = 100 * torch.finfo(expected.dtype).eps * float(expected.abs().max().clamp(min=1e-6))
    return found.shape == expected.shape and bool(((found - expected).abs() <= tolerance).all())


def _record_calls(backbone: nn.Module, layout: HeadLayout, images: int) -> dict[str, tuple[int, dict[Key, torch.Size]]]:
    """Return for every module of a forward pass the place of its call and the shapes of its tensor arguments."""
    calls: dict[str, tuple[int, dict[Key, torch.Size]]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments: dict[Key, Any] = dict([*enumerate(args), *kwargs.items()])
            shapes = {key: value.shape for key, value in arguments.items() if isinstance(value, Tensor)}
            # a module called twice is no join point: masks would join twice
            calls[name] = (-1, {}) if name in calls else (len(calls), shapes)

        return hook

    with _hooks(backbone, hook_of):
        backbone(example_images(backbone, layout.input_size, images))
    return calls


@contextmanager
def _hooks(backbone: nn.Module, hook_of: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Hold a pre-hook on every module."""
    with ExitStack() as stack:
        for name, module in backbone.named_modules():
            handle = module.register_forward_pre_hook(hook_of(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _candidates(
    layout: HeadLayout,
    layer: int,
    two: dict[str, tuple[int, dict[Key, torch.Size]]],
    three: dict[str, tuple[int, dict[Key, torch.Size]]],
) -> list[Join]:
    """Return the modules around a layer, innermost first, with the arguments that grow with the number of images."""
    attention = layout.layers[layer]
    name = attention.name
    names = [name] if attention.joins_itself else []
    while name:
        name = name.rpartition(".")[0]
        names.append(name)
    return [
        Join(name, two[name][0], _batched(two[name][1], three[name][1]))
        for name in names
        if name in two and two[name][0] >= 0
    ]


def _batched(two: dict[Key, torch.Size], three: dict[Key, torch.Size]) -> tuple[tuple[Key, int], ...]:
    """Return the tensor arguments that grow from 2 to 3 images as the batch does, with their rows per image."""
    batched = []
    for key, shape in two.items():
        if shape and 2 * three[key][0] == 3 * shape[0] and shape[0] % 2 == 0:
            batched.append((key, shape[0] // 2))
    return tuple(batched)
