"""What a head adds to the residual stream: its slice of the output projection, and norms after it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headprobe.metrics.token_grid import TokenGrid

NUMBERS_AT_ONCE = 1 << 19  # projected in one piece: larger ones fall out of a CPU's cache


@dataclass(frozen=True)
class HeadProjection:
    """The output projection of one layer, head by head.

    Attributes:
        weight: float32 `[heads, dim, head_dim]`. Head h adds `weight[h] @ u[h]` to the output, u being what enters the
            projection; the projection's bias belongs to no head.
        factor: float32 `[heads, r, head_dim]`, R of the QR decomposition of `weight[h]`. `|factor[h] @ u|` equals
            `|weight[h] @ u|` at a fraction of the work.
    """

    weight: Tensor
    factor: Tensor

    @classmethod
    def split(cls, weight: Tensor, heads: int) -> "HeadProjection":
        """Split a projection's weight `[dim, heads * head_dim]` into heads."""
        by_head = torch.unflatten(weight.detach().double(), 1, (heads, -1)).transpose(0, 1)  # [heads, dim, head_dim]
        factor = torch.linalg.qr(by_head, mode="r").R
        return cls(by_head.float().contiguous(), factor.float())

    @torch.no_grad()
    def norms(self, vectors: Tensor) -> Tensor:
        """Return Euclidean norms after the projection, `[rows, heads, tokens]`.

        Source: Kobayashi et al., 2020, section 2.2, https://arxiv.org/abs/2004.10102.

        Args:
            vectors: What enters the projection, `[rows, heads, tokens, head_dim]`.
        """
        norms = torch.empty(vectors.shape[:3], dtype=torch.float32, device=vectors.device)
        factor = self.factor.to(vectors.device).mT  # [heads, head_dim, r]
        rows = max(1, NUMBERS_AT_ONCE // math.prod(vectors.shape[1:]))
        for part, out in zip(torch.split(vectors, rows), torch.split(norms, rows), strict=True):
            # [heads, rows * tokens, head_dim]; a view of vectors that lie as an operator took them
            by_head = part.float().transpose(0, 1).flatten(1, 2)
            found = torch.linalg.vector_norm(torch.bmm(by_head, factor), dim=-1)
            out.copy_(torch.unflatten(found, 1, (len(part), -1)).transpose(0, 1))
        return norms


@torch.no_grad()
def output_norm_ratio(norms: Tensor, stream: Tensor, grid: TokenGrid) -> Tensor:
    """Return |what a head adds| / |residual stream before the layer|, mean over patches, `[images, heads]`.

    The mean is one of ratios, each at its own patch; prefix tokens and padding are left out. What a head adds includes
    a layer scale where the layer has one (`LayerFacts.projection`).

    A head that does nothing adds little (Bondarenko 2023, https://arxiv.org/abs/2306.12929). The ratio of norms is the
    one of Kobayashi 2020 taken for a whole head and relative to the stream it is added to.

    Args:
        norms: Norms of the heads' additions `[rows, heads, tokens]`, rows being windows where there are any.
        stream: Residual stream `[images, tokens, dim]`, in the order of the image.
        grid: Where the layer's tokens lie.
    """
    lengths = torch.linalg.vector_norm(stream.float(), dim=-1)  # [images, tokens]

    # bring the stream into the order of the layer's rows; padding takes patch 0, and is left out below
    places = torch.from_numpy(grid.places).to(stream.device)  # [windows, tokens]
    in_windows = lengths[:, grid.prefix + places.clamp_min(0)]  # [images, windows, tokens]
    of_token = in_windows[:, :, None, grid.prefix :]  # [images, windows, 1, patches]
    by_window = torch.unflatten(norms, 0, (-1, grid.windows))[..., grid.prefix :]  # [images, windows, heads, patches]

    real = (places >= 0)[:, None, grid.prefix :]  # [windows, 1, patches]
    return torch.where(real, by_window / of_token, 0.0).sum(dim=(1, 3)) / grid.patches
