"""Products in float32 that keep the small directions of every head: of samples that were made white before.

Rounding to float32 spoils a product in proportion to its factors. Heads vary a million times more along their first
axes than along their last ones, so products of plain samples hold nothing but rounding there, and canonical
correlations, which weigh all directions alike, are then wrong by a tenth. In white samples all directions are of one
size, and the error of `x^T G x` is a few float32 eps of it for every direction x.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from headprobe.metrics.similarity.extended_moments import add_cross, gram
from headprobe.metrics.similarity.head_blocks import Block

WORTHWHILE = 6  # heads of a block: with fewer, making samples white takes as long as float32 products save
FAINTEST = 1e-12  # of a head's mean square: what is added to each direction, so that all can be made white


class WhiteSamples:
    """Samples of a block, the channels of each head multiplied by the inverse of a Cholesky factor of their moments.

    The factors are of these samples alone, and what is multiplied by them is multiplied back in float64. So they change
    nothing but the rounding, and no state depends on them.

    Args:
        rows: Extended samples (see `extended_moments`), float64 `[images * tokens, extended]`.
        block: The block of heads.
    """

    def __init__(self, rows: Tensor, block: Block) -> None:
        self.block = block
        self.rows = rows.float()  # squared norms and the constant stay as they are
        self.factors: list[Tensor] = []  # of each layer, lower triangles, float64 `[heads, head_dim, head_dim]`
        for (heads, head_dim, _), columns in _layers(block):
            samples = torch.unflatten(rows[:, columns], 1, (heads, head_dim)).transpose(0, 1)  # [heads, rows, head_dim]
            factor = _factor(samples.mT @ samples / len(rows))
            identity = torch.eye(head_dim, dtype=rows.dtype, device=rows.device).expand_as(factor)
            inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
            white = torch.unflatten(self.rows[:, columns], 1, (heads, head_dim))  # a view
            white.copy_((samples @ inverse.mT).transpose(0, 1))
            self.factors.append(factor)

    def own(self) -> Tensor:
        """Return the moments of the samples, `[extended, extended]`."""
        return self._of_samples(gram(self.rows, self.block.width))

    def shifted(self, tokens: int) -> Tensor:
        """Return the cross moment of every image with the next one (see `add_cross`), `[extended, extended]`."""
        product = self.rows.new_zeros(self.block.extended, self.block.extended)
        add_cross(product, self.rows[:-tokens], self.rows[tokens:], self.block)
        return self._of_samples(product)

    def _of_samples(self, product: Tensor) -> Tensor:
        """Multiply the factors back, in float64, by the rows and by the columns."""
        return self._times_factors(self._times_factors(product.double()).T).T

    def _times_factors(self, product: Tensor) -> Tensor:
        """Multiply the rows of each head's channels by its factor, in place."""
        for ((heads, head_dim, _), columns), factor in zip(_layers(self.block), self.factors, strict=True):
            of_layer = torch.unflatten(product[columns], 0, (heads, head_dim))  # a view, [heads, head_dim, extended]
            of_layer.copy_(factor @ of_layer)
        return product


def _layers(block: Block) -> Iterator[tuple[tuple[int, int, int], slice]]:
    """Yield heads, dims and prefix tokens of each layer of a block, and the columns of its channels."""
    start = 0
    for shape in block.shapes:
        stop = start + shape.heads * shape.head_dim
        yield shape, slice(start, stop)
        start = stop


def _factor(moments: Tensor) -> Tensor:
    """Return lower triangles L with `L L^T = moments`, `[heads, dim, dim]`; the identity for a constant or broken head.

    `FAINTEST` is added on the diagonal first: among few samples there may be directions that none of them has.
    """
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    size = moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]  # of each head, [heads, 1, 1]
    factor, failed = torch.linalg.cholesky_ex(moments + FAINTEST * size * identity)
    usable = (failed == 0)[:, None, None] & (size > 0) & factor.isfinite().all(dim=-1).all(dim=-1)[:, None, None]
    return torch.where(usable, factor, identity)
