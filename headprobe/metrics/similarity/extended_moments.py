"""Second moments of samples extended by their heads' squared norms and a 1: all sums that similarities need, in one.

A sample x of a block of heads becomes `z = [x, |x_1|^2 ... |x_H|^2, 1]`, x taken about a fixed shift. The matrix
`sum z z^T` then holds n, sum x, sum x x^T, and what unbiased HSIC needs beside them: sum |x_h|^2, sum x |x_h|^2 and
sum |x_g|^2 |x_h|^2. Moving the shift is linear in z. So merging (Chan, Golub & LeVeque, 1983, American Statistician 37,
242-247, for the means and second moments) and centring are the same exact step for all of them.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from headprobe.metrics.similarity.head_blocks import Block

ROWS_AT_ONCE = 512  # extended together: more of them fall out of a CPU's cache between one step and the next
STRIP = 64  # channels in a strip of the cross moment, at least: narrower ones are multiplied slowly


def extend(samples: Sequence[Tensor], block: Block, shift: Tensor) -> Tensor:
    """Return the extended samples about a shift, float64 `[images * tokens, extended]`.

    Args:
        samples: `[images, tokens, heads, head_dim]` of each of the block's layers.
        block: The block of heads.
        shift: `[width]`.
    """
    rows = samples[0].shape[0] * samples[0].shape[1]
    extended = torch.empty(rows, block.extended, dtype=torch.float64, device=samples[0].device)

    # columns: channels of all layers, then squared norms of all heads, then the constant
    column, head = 0, block.width
    for layer in samples:
        heads, head_dim = layer.shape[2:]
        channels, norms = slice(column, column + heads * head_dim), slice(head, head + heads)
        flat = layer.reshape(rows, -1)
        for start in range(0, rows, ROWS_AT_ONCE):
            part = extended[start : start + ROWS_AT_ONCE]
            own = part[:, channels].copy_(flat[start : start + ROWS_AT_ONCE]).sub_(shift[channels])
            part[:, norms] = torch.linalg.vector_norm(torch.unflatten(own, 1, (heads, head_dim)), dim=2).square_()
        column, head = channels.stop, norms.stop
    extended[:, -1] = 1
    return extended


def gram(rows: Tensor, width: int) -> Tensor:
    """Return `rows^T rows`, `[columns, columns]`, most of its lower half copied from the upper one.

    That is a fifth faster on a CPU. The first `width` columns, the channels, are cut in four: all products but those
    with the few columns behind them then have even shapes, at which libraries are fastest.
    """
    product = rows.new_empty(rows.shape[1], rows.shape[1])
    step = -(-width // 4)
    for start in range(0, width, step):
        stop = min(start + step, width)
        # four strips of channels by channels, each from its diagonal block to the right
        torch.mm(rows[:, start:stop].T, rows[:, start:width], out=product[start:stop, start:width])
        product[stop:width, start:stop] = product[start:stop, stop:width].T

    # norms and constant by all columns, and the mirrored strip beside the channels
    torch.mm(rows[:, width:].T, rows, out=product[width:])
    product[:width, width:] = product[width:, :width].T
    return product


def add_cross(total: Tensor, rows: Tensor, others: Tensor, block: Block) -> None:
    """Add `rows^T others` to `total`, `[extended, extended]`, but for channels of a head by those of earlier heads.

    The noise floor needs none of those: the row's head takes an image and the same head or a later one the next image.

    Args:
        total: What is added to.
        rows: `[samples, extended]`.
        others: Alike.
        block: The block of heads.
    """
    for start, stop in _strips(block):
        total[start:stop, start:].addmm_(rows[:, start:stop].T, others[:, start:])
    total[block.width :].addmm_(rows[:, block.width :].T, others)  # norms and constant by all columns


@lru_cache(maxsize=64)
def _strips(block: Block) -> tuple[tuple[int, int], ...]:
    """Return where strips of whole heads begin and end: wide enough to multiply fast, and no wider than need be."""
    widest = max(STRIP, -(-block.width // 8))
    strips: list[tuple[int, int]] = []
    start = stop = 0
    for dims in block.dims:
        stop += dims
        if stop - start >= widest or stop == block.width:
            strips.append((start, stop))
            start = stop
    return tuple(strips)


def move(moments: Tensor, step: Tensor, block: Block) -> Tensor:
    """Return the moments `[extended, extended]` about a shift that is larger by `step` `[width]`.

    The step is a linear map of z: it is applied to the rows, then to the columns.
    """
    return _move_rows(_move_rows(moments, step, block).T, step, block).T


def _move_rows(moments: Tensor, step: Tensor, block: Block) -> Tensor:
    """Put x - step and |x_h - step_h|^2 = |x_h|^2 - 2 step_h . x_h + |step_h|^2 for x and |x_h|^2 in the rows."""
    width = block.width
    channels, squares, constant = moments[:width], moments[width:-1], moments[-1]

    head_of_column = torch.repeat_interleave(torch.tensor(block.dims, device=moments.device))  # [width]
    norms = torch.zeros(block.heads, dtype=step.dtype, device=step.device)  # |step_h|^2, [heads]
    norms.index_add_(0, head_of_column, step.square())
    dots = torch.zeros_like(squares)  # step_h . x_h, [heads, extended]
    dots.index_add_(0, head_of_column, step[:, None] * channels)

    return torch.cat(
        [
            channels - step[:, None] * constant,
            squares - 2 * dots + norms[:, None] * constant,
            moments[-1:],
        ]
    )
