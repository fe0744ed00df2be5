"""Watches one forward pass: which modules run, in what order, on what shapes, and where attention is computed."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.calls import CallKind, WatchCalls
from headprobe.backbone.sites import Site, class_path
from headprobe.errors import UsageError


def example_images(backbone: nn.Module, input_size: tuple[int, int, int], images: int, seed: int = 0) -> Tensor:
    """Return seeded normal noise `[images, channels, height, width]` on the backbone's device and in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, *input_size, generator=generator)
    like = next(backbone.parameters())
    return noise.to(device=like.device, dtype=like.dtype)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold `module` in evaluation mode and float32 at its word, and give every part its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with _unrounded(next(module.parameters()).device.type):
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _unrounded(device: str) -> Iterator[None]:
    """Switch off what computes float32 more coarsely: autocast, and TF32, which convolutions on GPUs use by default.

    It would round by 1e-3, otherwise for another batch shape, and hide errors or look like one.
    """
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        if device == "cuda":
            cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
            stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            stack.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
            stack.callback(torch.set_float32_matmul_precision, precision)
            cudnn.allow_tf32 = cudnn.benchmark = False
            torch.set_float32_matmul_precision("highest")
        yield


@dataclass(frozen=True)
class Call:
    """One call that attention is made of.

    Attributes:
        kind: What was called.
        shape: Shape of its result.
    """

    kind: CallKind
    shape: torch.Size


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        order: Names of the attention layers in the order of their calls.
        entered: How often each of them was called.
        shapes: For each of them the shape of its concatenated heads.
        calls: For each of them its calls before the heads were concatenated.
        block_shapes: For every module the shape of its first argument.
        open_layers: Attention layers that are running.
        open_modules: Modules that are running.
        stray: Modules that compute attention outside every layer, with the kinds of calls they made.
    """

    order: list[str] = field(default_factory=list)
    entered: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    block_shapes: dict[str, torch.Size] = field(default_factory=dict)
    open_layers: list[str] = field(default_factory=list)
    open_modules: list[str] = field(default_factory=list)
    stray: dict[str, list[CallKind]] = field(default_factory=dict)

    def saw(self, kind: CallKind, _: tuple[Any, ...], __: dict[str, Any], result: Tensor) -> Tensor:
        """Note one call."""
        if not self.open_layers:
            module = self.open_modules[-1] if self.open_modules else ""
            self.stray.setdefault(module, []).append(kind)
        elif self.open_layers[-1] not in self.shapes:
            self.calls[self.open_layers[-1]].append(Call(kind, result.shape))
        return result

    @property
    def stray_fused(self) -> list[str]:
        """Modules that call fused attention outside every layer."""
        return [module for module, kinds in self.stray.items() if "fused" in kinds]

    @property
    def stray_plain(self) -> list[str]:
        """Modules that apply a softmax by a matrix product outside every layer."""
        found = []
        for module, kinds in self.stray.items():
            if "fused" not in kinds and "softmax" in kinds and "product" in kinds[kinds.index("softmax") :]:
                found.append(module)
        return found


@contextmanager
def recording(backbone: nn.Module, sites: Mapping[str, Site], trace: Trace) -> Iterator[None]:
    """Fill `trace` while the context is open.

    Args:
        backbone: The model.
        sites: Its attention modules by name.
        trace: Is filled.
    """
    with ExitStack() as stack:
        for name, module in backbone.named_modules():
            for handle in _watch(backbone, name, module, sites.get(name), trace):
                stack.callback(handle.remove)
        stack.enter_context(WatchCalls(trace.saw))
        yield


def _watch(
    backbone: nn.Module, name: str, module: nn.Module, site: Site | None, trace: Trace
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hook one module so that it notes its calls in `trace`."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
        trace.open_modules.append(name)
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

    def at_site(_: nn.Module, args: tuple[Any, ...]) -> None:
        trace.shapes.setdefault(name, args[0].shape)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    if site is not None:
        point = backbone.get_submodule(point_of(module, name, site))
        handles.append(point.register_forward_pre_hook(at_site))
    return handles


def point_of(module: nn.Module, name: str, site: Site) -> str:
    """Return the qualified name of the head-concat point of an attention module."""
    for point in site.points:
        if isinstance(getattr(module, point, None), nn.Module):
            return f"{name}.{point}" if name else point
    raise UsageError(
        f"attention module {name!r} ({class_path(module)}) has none of the sub-modules {', '.join(site.points)} "
        "that its class has in the timm releases headprobe knows; install a supported timm"
    )
