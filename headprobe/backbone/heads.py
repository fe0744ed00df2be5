"""Finds the attention heads of a timm model and describes them; a model whose heads cannot be found is refused."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from headprobe.backbone.sites import Kind, Site, class_path, looks_like_attention, site_of
from headprobe.backbone.trace import Trace, evaluating, example_images, point_of, recording
from headprobe.errors import UsageError

Size = tuple[int, int]


@dataclass(frozen=True)
class AttentionLayer:
    """One multi-head attention module.

    Attributes:
        name: Qualified module name, as in `blocks.3.attn`.
        point: Qualified name of the sub-module whose input is the concatenated heads.
        kind: `global`, `window` or `pool`.
        heads: Number of heads.
        head_dim: Channels of one head.
        tokens: Tokens of one row of the module's batch (of one window, where it has windows).
        stage: Number of the resolution stage, from 0.
        grid: Patch rows and columns of the whole image at this layer, None where there is no grid.
        window: Rows and columns of a window, None for global attention.
        shift: Rows and columns that the windows are shifted by.
        inner_norm: A norm over all heads stands between the heads and the projection: masking a head rescales the
            others too.
        joins_itself: A mask may join the growing pass at this module's own input.
    """

    name: str
    point: str
    kind: Kind
    heads: int
    head_dim: int
    tokens: int
    stage: int
    grid: Size | None
    window: Size | None
    shift: Size
    inner_norm: bool
    joins_itself: bool


@dataclass(frozen=True)
class HeadLayout:
    """The attention layers of one model in execution order.

    Attributes:
        model: The model's name, for messages.
        layers: The layers; a layer's number is its place here.
        prefix_tokens: Class, distillation and register tokens: those with no place on the patch grid.
        input_size: `(channels, height, width)` of an image.
    """

    model: str
    layers: tuple[AttentionLayer, ...]
    prefix_tokens: int
    input_size: tuple[int, int, int]

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return tuple(layer.heads for layer in self.layers)


def find_heads(backbone: nn.Module, input_size: tuple[int, int, int], model: str) -> HeadLayout:
    """Find every attention layer of `backbone` by running one image through it.

    Args:
        backbone: A timm model.
        input_size: `(channels, height, width)` of the images it takes.
        model: Its name, for messages.

    Raises:
        UsageError: The model has no heads, or has attention that headprobe does not know: it is never run unmasked.
    """
    sites = _known_sites(backbone, model)
    trace = Trace()
    with ExitStack() as stack:
        stack.enter_context(evaluating(backbone))
        stack.enter_context(recording(backbone, sites, trace))
        stack.enter_context(torch.inference_mode())
        backbone(example_images(backbone, input_size, 1))
    _refuse_surprises(sites, trace, model)
    grids = {name: _grid(backbone, name, sites[name], trace) for name in trace.order}
    stages = sorted({grid or (0, 0) for grid in grids.values()}, reverse=True)
    layers = tuple(
        _describe(backbone, name, sites[name], trace, grids[name], stages.index(grids[name] or (0, 0)))
        for name in trace.order
    )
    return HeadLayout(model, layers, _prefix_tokens(backbone), input_size)


def _known_sites(backbone: nn.Module, model: str) -> dict[str, Site]:
    """Map the names of all known attention modules to their sites; refuse unknown ones."""
    if isinstance(backbone, torch.jit.ScriptModule):
        raise UsageError(
            f"model {model!r} is a TorchScript module, whose heads cannot be reached; pass the Python model"
        )
    sites: dict[str, Site] = {}
    unknown: dict[str, str] = {}
    for name, module in backbone.named_modules():
        site = site_of(module)
        if site is not None:
            sites[name] = site
        elif looks_like_attention(module):
            unknown[name] = class_path(module)
    if unknown:
        name, path = next(iter(unknown.items()))
        raise UsageError(
            f"model {model!r} has {len(unknown)} attention modules of a class that headprobe cannot mask yet, "
            f"the first is {name!r} ({path}); supported are ViT, DeiT, BEiT, EVA, DINOv2, CLIP, SigLIP and Swin v1/v2"
        )
    if not sites:
        raise UsageError(
            f"model {model!r} has no attention heads that headprobe knows; "
            "choose a transformer such as vit_base_patch16_224 or swin_tiny_patch4_window7_224"
        )
    return sites


def _refuse_surprises(sites: dict[str, Site], trace: Trace, model: str) -> None:
    """Refuse models whose forward pass does not use each known layer once, or attends somewhere else."""
    if trace.stray:
        raise UsageError(
            f"model {model!r} computes attention in {trace.stray[0]!r}, "
            "which is of no class that headprobe can mask yet"
        )
    repeated = [name for name, calls in trace.calls.items() if calls > 1]
    if repeated:
        raise UsageError(
            f"model {model!r} runs {repeated[0]!r} more than once per image: its heads cannot be told apart"
        )
    unused = [name for name in sites if name not in trace.shapes]
    if unused:
        raise UsageError(f"model {model!r} never reaches the heads of {unused[0]!r}: they cannot be masked")


def _prefix_tokens(backbone: nn.Module) -> int:
    """Return how many tokens have no place on the patch grid."""
    return int(getattr(backbone, "num_prefix_tokens", 0))


def parent_of(name: str) -> str:
    """Return the qualified name of the module around another."""
    return name.rpartition(".")[0]


def _grid(backbone: nn.Module, name: str, site: Site, trace: Trace) -> Size | None:
    """Return the patch grid at a layer: the block's map for windows, the patch embedding's for global attention."""
    if site.kind == "window":
        shape = trace.block_shapes.get(parent_of(name))
        # Swin v1, v2: [rows, height, width, channels]; v2-CR: [rows, channels, height, width] outside its stages
        return (shape[1], shape[2]) if shape is not None and len(shape) == 4 else None
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    patches = trace.block_shapes[name][1] - _prefix_tokens(backbone) if len(trace.block_shapes[name]) == 3 else 0
    if grid is not None and math.prod(grid) == patches:
        return (int(grid[0]), int(grid[1]))
    side = math.isqrt(max(patches, 0))
    return (side, side) if side and side * side == patches else None


def _pair(size: Any) -> Size:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _describe(
    backbone: nn.Module, name: str, site: Site, trace: Trace, grid: Size | None, stage: int
) -> AttentionLayer:
    """Put together what is known of one attention layer."""
    module = backbone.get_submodule(name)
    shape, heads = trace.shapes[name], int(module.num_heads)  # type: ignore[arg-type]  # checked by the table
    point = point_of(module, name, site)
    windowed = site.kind == "window"
    return AttentionLayer(
        name=name,
        point=point,
        kind=site.kind,
        heads=heads,
        head_dim=shape[-1] // heads,
        tokens=shape[1],
        stage=stage,
        grid=grid,
        window=_pair(module.window_size) if windowed else None,
        shift=_pair(getattr(backbone.get_submodule(parent_of(name)), "shift_size", 0)) if windowed else (0, 0),
        inner_norm=point.endswith(".norm") and not isinstance(backbone.get_submodule(point), nn.Identity),
        joins_itself=site.joins_itself,
    )
