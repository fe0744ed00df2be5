"""`NoHeads`: what is left of an attention layer without heads, the bias of its projection."""

from typing import Any

from torch import Tensor, nn

PRENORM = (
    "timm.models.vision_transformer.Block",
    "timm.models.eva.EvaBlock",
    "timm.models.beit.Block",
    "timm.models.swin_transformer.SwinTransformerBlock",
)
"""Blocks whose `norm1` is read by their attention alone: it goes with the heads."""


class NoNorm(nn.Identity):
    """Stands where a layer's norm was that nothing reads any more.

    Args:
        like: A tensor on the device and of the type of the norm; Swin asks its `weight` for them where the image size
            changes.
    """

    weight: Tensor  #: `[0]`

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", like.detach().new_empty(0), persistent=False)


class NoHeads(nn.Module):
    """Stands where an attention layer was and adds the same vector to every token, whatever they are.

    It takes the arguments of every attention class that can be pruned, and computes nothing.

    Args:
        bias: `[dim]`, the bias of the output projection with all that was folded into it.
        drop: The dropout behind the projection.
    """

    def __init__(self, bias: Tensor, drop: nn.Module | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.proj_drop = nn.Identity() if drop is None else drop

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the bias for each token, `[..., dim]`: a view, that no memory is taken for."""
        found: Tensor = self.proj_drop(self.bias.expand(*x.shape[:-1], -1))
        return found

    def set_window_size(self, window_size: Any) -> None:
        """Do nothing: there are no positions. Swin and BEiT call it where the image size changes."""
