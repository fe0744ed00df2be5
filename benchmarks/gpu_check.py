"""Models with random weights for the GPU benchmark, and the check of the growing pass against plain hooks."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.sandbox import perturbed
from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.passes import ForwardPasses


def without_tf32() -> None:
    """Compute float32 in float32."""
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # torch 2.9 and later
        backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "ieee"
    else:
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = False


def model_of(name: str, options: dict[str, Any], device: torch.device) -> tuple[nn.Module, HeadLayout]:
    """Return a timm model with random perturbed weights, and its attention layers."""
    torch.manual_seed(0)
    backbone = perturbed(timm.create_model(name, pretrained=False, **options)).to(device).eval()
    side = options.get("img_size", 224)
    return backbone, find_heads(backbone, (3, side, side), name)


def masks_of(layout: HeadLayout, device: torch.device, spec: str = "each:head") -> Tensor:
    """Return the masks of a spec, of single heads without one, `[masks, layers, max heads]`, True = keep."""
    variants = expand_all([MaskSpec(spec)], layout.heads_per_layer, layout.model)
    return torch.stack([variant.mask.mask.keep() for variant in variants]).to(device)


def noise(layout: HeadLayout, images: int, device: torch.device) -> Tensor:
    """Return uint8 images of noise `[images, channels, height, width]`."""
    return torch.randint(0, 256, (images, *layout.input_size), dtype=torch.uint8, device=device)


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images in -1 to 1."""
    return images.float().div(127.5).sub(1)


def correctness(model: tuple[nn.Module, HeadLayout], images: int) -> float:
    """Return the largest difference of logits between the growing pass and plain hooks, of the largest logit."""
    backbone, layout = model
    device = next(backbone.parameters()).device
    keep, data = masks_of(layout, device), noise(layout, images, device)
    with torch.inference_mode():
        passes = ForwardPasses(backbone, layout, keep, normalised, images, budget=images * (1 + len(keep)))
        found = passes.outputs(data)[1:]
        plain: Tensor = backbone(normalised(data))
        expected = torch.stack([one_masked(backbone, normalised(data), mask) for mask in keep])
        silent = sum(torch.equal(one, plain) for one in expected)
    if silent:
        raise SystemExit(f"benchmarks.gpu: error: {silent} masks change nothing; the check would prove nothing")
    return float((found - expected).abs().max() / expected.abs().max())


def one_masked(backbone: Any, images: Tensor, keep: Tensor) -> Tensor:
    """Return the logits of one forward pass in which a plain hook zeroes the heads that are not kept.

    Args:
        backbone: A timm ViT.
        images: Normalised.
        keep: `[layers, max heads]` bool.
    """

    def zero(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        size = args[0].shape[-1] // keep.shape[1]
        return (args[0] * keep[place[module]].repeat_interleave(size),)

    place = {block.attn.proj: layer for layer, block in enumerate(backbone.blocks)}
    handles = [module.register_forward_pre_hook(zero) for module in place]
    try:
        logits: Tensor = backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits
