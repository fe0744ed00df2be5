"""Finds the attention heads of a timm model and describes them; refuses a model where they cannot be found."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from headprobe.backbone.heads.layout import (
    AttentionLayer,
    HeadChannels,
    HeadLayout,
    Operator,
    Semantics,
    parent_of,
)
from headprobe.backbone.heads.reasons import FAILURES, why_it_fails, why_no_heads
from headprobe.backbone.heads.refusals import attention_sites, refuse_surprises
from headprobe.backbone.heads.sites import Kind, Site, class_path, known_site
from headprobe.backbone.heads.trace import Call, Trace, point_of, recording
from headprobe.backbone.sandbox import evaluating, example_images, is_out_of_memory, trying
from headprobe.errors import UsageError
from headprobe.metrics.token_grid import Size
from headprobe.text import first_line


def find_heads(
    backbone: nn.Module, input_size: tuple[int, int, int], model: str, semantics: Semantics = "slot"
) -> HeadLayout:
    """Find every attention layer of `backbone` by running one image through it.

    Args:
        backbone: A timm model.
        input_size: `(channels, height, width)` of the images it takes.
        model: Its name, for messages.
        semantics: What masking a head takes away where its slot holds more than the head attended to.

    Raises:
        UsageError: The model has no heads, or has attention that cannot be masked: it is never run unmasked.
    """
    if semantics not in get_args(Semantics):
        raise UsageError(f"semantics must be one of {', '.join(get_args(Semantics))}, got {semantics!r}")

    sites = attention_sites(backbone, model)
    run = _run(backbone, sites, input_size, model)
    if not sites:
        raise UsageError(why_no_heads(backbone, run.trace, model))
    if not isinstance(run.output, Tensor):
        raise UsageError(
            f"model {model!r} returns a {type(run.output).__name__} and not one tensor, so masks have no single output "
            "to change; build it without features_only, or wrap it so that it returns the logits"
        )
    trace = run.trace
    refuse_surprises(backbone, sites, trace, model)

    prefix = _prefix_tokens(backbone)
    layers: list[AttentionLayer] = []
    for name in trace.order:
        before = layers[-1] if layers else None
        layers.append(_describe(backbone, name, sites[name], trace, input_size, prefix, semantics, before))
    return HeadLayout(model, tuple(layers), prefix, input_size, tuple(trace.stray_headless), run.gradients)


class _Run(NamedTuple):
    """One forward pass on noise.

    Attributes:
        trace: How it went.
        output: What the model returned.
        gradients: It was run with gradients, because it fails without.
    """

    trace: Trace
    output: Any
    gradients: bool


def _run(backbone: nn.Module, sites: Mapping[str, Site], input_size: tuple[int, int, int], model: str) -> _Run:
    """Run one image of noise through a model: without gradients, and where that fails with them.

    Raises:
        UsageError: It fails with gradients too.
    """
    try:
        return _traced(backbone, sites, input_size, gradients=False)
    except FAILURES as error:
        _raise_own(error)
        without = first_line(error)  # the error itself would hold what the pass computed
    try:
        return _traced(backbone, sites, input_size, gradients=True)
    except FAILURES as error:
        _raise_own(error)
        raise UsageError(why_it_fails(backbone, input_size, model, without, error)) from error


def _traced(backbone: nn.Module, sites: Mapping[str, Site], input_size: tuple[int, int, int], gradients: bool) -> _Run:
    trace = Trace()
    with evaluating(backbone), recording(backbone, sites, trace), trying(backbone, gradients):
        return _Run(trace, backbone(example_images(backbone, input_size, 1)), gradients)


def _raise_own(error: Exception) -> None:
    """Raise an error again that says all itself: headprobe's own, or that memory has ended."""
    if isinstance(error, UsageError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
        raise error


def _prefix_tokens(backbone: nn.Module) -> int:
    """Return how many tokens have no place on the patch grid."""
    return int(getattr(backbone, "num_prefix_tokens", 0))


def _describe(
    backbone: nn.Module,
    name: str,
    site: Site,
    trace: Trace,
    input_size: tuple[int, int, int],
    prefix: int,
    semantics: Semantics,
    before: AttentionLayer | None,
) -> AttentionLayer:
    """Put together what is known of one attention layer."""
    module = backbone.get_submodule(name)
    point = point_of(module, name, site)
    point_module = backbone.get_submodule(point)
    shape = trace.shapes[name]  # [rows, ..., channels] or [rows, channels, ...]
    heads = int(site.heads(module))

    operator = _operator(trace.calls[name], site, heads)
    channels = _channels(name, site, point_module, shape, heads, trace.calls[name], operator)
    rows, tokens = shape[0], math.prod(shape[1:]) // shape[channels.axis]
    kind = _kind(site, rows, operator, trace.calls[name])

    windowed = site.kind == "window" and site.residual  # Swin: windows of known places
    grid, own_prefix = None, 0
    if windowed:
        # the layer gets windows, the block around it whole images
        grid = _window_grid(trace.block_shapes.get(parent_of(name)))
    elif kind != "window":
        grid, own_prefix = _grid(site, shape, channels.axis, input_size, prefix)

    return AttentionLayer(
        name=name,
        attention_class=class_path(module),
        site=site,
        known=known_site(module) is not None,
        point=point,
        channels=channels,
        operator=operator,
        kind=kind,
        rows=rows,
        tokens=tokens,
        prefix=own_prefix,
        stage=_stage(rows * tokens, kind, before),
        grid=grid,
        window=_pair(module.window_size) if windowed else None,
        shift=_pair(getattr(backbone.get_submodule(parent_of(name)), "shift_size", 0)) if windowed else (0, 0),
        inner_norm=point.endswith(".norm") and not isinstance(point_module, nn.Identity),
        semantics=semantics,
    )


def _operator(calls: list[Call], site: Site, heads: int) -> Operator | None:
    """Find the calls in which attention is applied to the values: all fused ones, else the last matrix product."""
    fused = sum(call.kind == "fused" for call in calls)
    if fused:
        return Operator(True, tuple(range(fused)), site.form, heads)

    # numbers among the products, not among all calls
    products = [(at, call) for at, call in enumerate(calls) if call.kind == "product"]
    if site.form == "by call":
        # one product for each head, right behind its softmax
        chosen = [number for number, (at, _) in enumerate(products) if at and calls[at - 1].kind == "softmax"]
    elif site.form == "every":
        # all products with the heads on axis 1
        chosen = []
        for number, (_, call) in enumerate(products):
            if len(call.shape) >= 4 and call.shape[1] == heads:
                chosen.append(number)
    else:
        # queries by keys comes first, weights by values last
        chosen = list(range(len(products)))[-1:]
    if not chosen or (site.form == "by call" and len(chosen) != heads):
        return None
    return Operator(False, tuple(chosen), site.form, heads)


def _output_shape(operator: Operator | None, calls: list[Call]) -> torch.Size:
    """Return the shape of the result of the operator's first call."""
    if operator is None:
        return torch.Size()
    return [call.shape for call in calls if call.kind == operator.kind][operator.calls[0]]


def _channels(
    name: str,
    site: Site,
    point: nn.Module,
    shape: torch.Size,
    heads: int,
    calls: list[Call],
    operator: Operator | None,
) -> HeadChannels:
    """Return which channels belong to which head."""
    axis = site.axis
    if axis is None:  # a convolution takes its channels on axis 1
        axis = 1 if any(isinstance(part, nn.Conv2d) for part in point.modules()) else -1

    width = shape[axis]
    if site.leading and operator is not None:
        # channels of an mlp follow: the operator's output has only a head's own
        width = heads * _output_shape(operator, calls)[-1]
    if heads < 1 or width % heads or width > shape[axis]:
        raise UsageError(
            f"attention module {name!r} concatenates {shape[axis]} channels, which are not those of {heads} heads"
        )
    return HeadChannels(heads, width // heads, axis, site.interleaved)


def _kind(site: Site, rows: int, operator: Operator | None, calls: list[Call]) -> Kind:
    """Return the site's kind, or `window` where the rows turn out to be parts of an image.

    Windows are rows of the batch, or an axis of their own in `[rows, heads, windows, tokens, head_dim]`.
    """
    apart = rows > 1 or (len(_output_shape(operator, calls)) == 5 and site.form == "axis")
    return "window" if site.kind == "global" and apart else site.kind


def _stage(tokens: int, kind: Kind, before: AttentionLayer | None) -> int:
    """Count how often the tokens of an image became fewer; pooling leaves few tokens, but begins no stage."""
    if before is None:
        return 0
    return before.stage + (kind not in ("pool", "class") and tokens < before.rows * before.tokens)


def _window_grid(block: torch.Size | None) -> Size | None:
    """Return the patch grid of a Swin block by the shape of its input.

    Blocks take `[rows, height, width, channels]`, in v2-CR too: only outside its stages it has the channels on axis 1.
    """
    return (block[1], block[2]) if block is not None and len(block) == 4 else None


def _grid(
    site: Site, shape: torch.Size, axis: int, input_size: tuple[int, int, int], prefix: int
) -> tuple[Size | None, int]:
    """Return the patch grid at a layer with an image in each row, and how many tokens without a place precede it."""
    if len(shape) == 4 and axis == 1:  # [rows, channels, height, width]
        return (shape[2], shape[3]), 0
    if not site.ordered:
        return None, 0
    if len(shape) == 4:  # [rows, height, width, channels]
        return (shape[1], shape[2]), 0
    if len(shape) != 3:
        return None, 0

    # [rows, tokens, channels]: the grid follows from the number of tokens
    for leading in dict.fromkeys((prefix, 0)):  # class tokens may join later than the first layers
        grid = _grid_of(shape[1] - leading, input_size[1:])
        if grid is not None:
            return grid, leading
    return None, prefix


def _grid_of(patches: int, image: Size) -> Size | None:
    """Return the rows and columns of a grid of so many patches; None where no stride on the image gives it.

    A stride that does not divide the image cuts its edge off, or pads it.
    """
    for stride in range(1, max(image) + 1):
        for rounded in (math.floor, math.ceil):
            grid = (rounded(image[0] / stride), rounded(image[1] / stride))
            if math.prod(grid) == patches:
                return grid
    return None


def _pair(size: Any) -> Size:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
