"""Second moments of samples extended by their heads' squared norms and a 1: all sums that similarities need, in one.

A sample x of a block of heads becomes ``z = [x, |x_1|^2 ... |x_H|^2, 1]``, x taken about a fixed shift. The matrix
``sum z z^T`` then holds n, sum x, sum x x^T, and what unbiased HSIC needs beside them: sum |x_h|^2, sum x |x_h|^2 and
sum |x_g|^2 |x_h|^2. Moving the shift is linear in z, so that merging (Chan, Golub & LeVeque, 1983, American
Statistician 37, 242-247, for the means and second moments) and centring are the same exact step for all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from headprobe.metrics.similarity.head_blocks import Block


def extend(samples: Sequence[Tensor], block: Block, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``[images * tokens, extended]`` about `shift` ``[width]``.

    `samples` holds the ``[images, tokens, heads, head_dim]`` of each of the block's layers.
    """
    rows = samples[0].shape[0] * samples[0].shape[1]
    extended = torch.empty(rows, block.extended, dtype=dtype, device=samples[0].device)
    column, head = 0, block.width
    for layer in samples:
        heads, head_dim = layer.shape[2:]
        part = extended[:, column : column + heads * head_dim]
        about = shift[column : column + heads * head_dim].to(torch.promote_types(layer.dtype, dtype))
        torch.sub(layer.reshape(rows, -1), about, out=part)
        squares = part.view(rows, heads, head_dim).square()
        torch.sum(squares, dim=2, out=extended[:, head : head + heads])
        column, head = column + heads * head_dim, head + heads
    extended[:, -1] = 1
    return extended


def gram(rows: Tensor, width: int) -> Tensor:
    """Return ``rows^T rows``, of which what lies below the diagonal is copied from above it (a fifth faster on a CPU).

    The first `width` columns, the channels, are cut in four: all products but those with the few columns behind them
    then have even shapes, at which libraries are fastest.
    """
    product = rows.new_empty(rows.shape[1], rows.shape[1])
    step = -(-width // 4)
    for start in range(0, width, step):
        stop = min(start + step, width)
        torch.mm(rows[:, start:stop].T, rows[:, start:width], out=product[start:stop, start:width])
        product[stop:width, start:stop] = product[start:stop, stop:width].T
    torch.mm(rows[:, width:].T, rows, out=product[width:])
    product[:width, width:] = product[width:, :width].T
    return product


def move(moments: Tensor, step: Tensor, block: Block) -> Tensor:
    """Return the moments ``[extended, extended]`` about a shift that is larger by `step` ``[width]``."""
    return _move_rows(_move_rows(moments, step, block).T, step, block).T


def _move_rows(moments: Tensor, step: Tensor, block: Block) -> Tensor:
    """Put x - step and |x_h - step_h|^2 = |x_h|^2 - 2 step_h . x_h + |step_h|^2 for x and |x_h|^2 in the rows."""
    width = block.width
    head_of_column = torch.repeat_interleave(torch.tensor(block.dims, device=moments.device))
    norms = torch.zeros(block.heads, dtype=step.dtype, device=step.device).index_add_(0, head_of_column, step.square())
    dots = torch.zeros_like(moments[width:-1]).index_add_(0, head_of_column, step[:, None] * moments[:width])
    return torch.cat(
        [
            moments[:width] - step[:, None] * moments[-1],
            moments[width:-1] - 2 * dots + norms[:, None] * moments[-1],
            moments[-1:],
        ]
    )
