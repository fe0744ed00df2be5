"""What a head adds to the residual stream: its slice of the output projection, and norms after it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headprobe.metrics.token_grid import TokenGrid


@dataclass(frozen=True)
class HeadProjection:
    """The output projection of one layer, head by head.

    Attributes:
        weight: float32 `[heads, dim, head_dim]`: head h adds `weight[h] @ u[h]` to the output, u being what enters the
            projection; its bias belongs to no head.
        factor: float32 `[heads, r, head_dim]`, R of its QR decomposition: `|factor[h] @ u| = |weight[h] @ u|` at a
            fraction of the work.
    """

    weight: Tensor
    factor: Tensor

    @classmethod
    def split(cls, weight: Tensor, heads: int) -> "HeadProjection":
        """Split `[dim, heads * head_dim]` into heads."""
        by_head = torch.unflatten(weight.detach().double(), 1, (heads, -1)).transpose(0, 1)
        factor = torch.linalg.qr(by_head, mode="r").R
        return cls(by_head.float().contiguous(), factor.float())

    @torch.no_grad()
    def norms(self, vectors: Tensor) -> Tensor:
        """Return Euclidean norms after the projection `[rows, heads, tokens]` of `[rows, heads, tokens, head_dim]`.

        Source: Kobayashi et al., 2020, section 2.2, https://arxiv.org/abs/2004.10102.
        """
        norms = torch.empty(vectors.shape[:3], dtype=torch.float32, device=vectors.device)
        for head, factor in enumerate(self.factor.to(vectors.device)):  # one large product per head, none of a copy
            added = vectors[:, head].float().flatten(0, 1) @ factor.mT
            norms[:, head] = torch.linalg.vector_norm(added, dim=-1).view(len(vectors), -1)
        return norms


@torch.no_grad()
def output_norm_ratio(norms: Tensor, stream: Tensor, grid: TokenGrid) -> Tensor:
    """Return `[images, heads]`: |what a head adds| / |residual stream before the layer|, mean over patches.

    A head that does nothing adds little (Bondarenko 2023, https://arxiv.org/abs/2306.12929); the ratio of norms is the
    one of Kobayashi 2020 taken for a whole head and relative to the stream it is added to.

    Args:
        norms: Norms of the heads' additions `[rows, heads, tokens]`, rows being windows where there are any.
        stream: Residual stream `[images, tokens, dim]`, in the order of the image.
        grid: Where the layer's tokens lie.
    """
    lengths = torch.linalg.vector_norm(stream.float(), dim=-1)
    places = torch.from_numpy(grid.places).to(stream.device)
    of_token = lengths[:, grid.prefix + places.clamp_min(0)][:, :, None, grid.prefix :]
    by_window = torch.unflatten(norms, 0, (-1, grid.windows))[..., grid.prefix :]
    real = (places >= 0)[:, None, grid.prefix :]
    return torch.where(real, by_window / of_token, 0.0).sum(dim=(1, 3)) / grid.patches
