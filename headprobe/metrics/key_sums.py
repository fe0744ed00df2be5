"""Statistics of a layer's attention that follow from sums over queries, key by key."""

import torch
from torch import Tensor

from headprobe.metrics.token_grid import GridTables
from headprobe.metrics.weights_chunk import a_ln_a


def mutual_information(shares: Tensor, entropy: Tensor, members: Tensor) -> Tensor | None:
    """Return the normalised mutual information of query and key `[images, heads]`, None where no two patches meet.

    Args:
        shares: Renormalised weights summed over queries `[images, windows, heads, keys]`.
        entropy: Entropies of the queries' weights, summed over each group `[images, windows, heads, groups]`.
        members: `[windows, groups, keys]`, 1 where a patch is in the group.
    """
    sizes = members.sum(dim=-1)  # [windows, groups]
    counted = torch.where(sizes > 1, sizes, 0.0).expand(shares.shape[1], -1)
    if not float(counted.sum()):
        return None
    size_of_key = torch.einsum("wg,wgk->wk", sizes, members).clamp_min(1)
    marginal = a_ln_a(shares / size_of_key[:, None])
    of_key = -torch.einsum("bwhk,wgk->bwhg", marginal, members.expand(shares.shape[1], -1, -1))
    information = (of_key - entropy / sizes.clamp_min(1)[:, None]).clamp_min(0)
    scale = (of_key.clamp_min(0) * sizes.clamp_min(1).log()[:, None]).sqrt()
    normalised = torch.where(scale <= 0, 0.0, information / scale)  # NaN stays NaN
    return (normalised * counted[:, None]).sum(dim=(1, 3)) / counted.sum()


def sink(columns: Tensor, tables: GridTables) -> Tensor:
    """Return the sink mass `[images, heads]` from weights summed over all queries `[images, windows, heads, keys]`."""
    queries = (tables.members * tables.real[:, None]).sum(dim=-1)  # [windows, groups]
    mean = columns / torch.einsum("wg,wgk->wk", queries, tables.members).clamp_min(1)[:, None]
    largest = torch.stack([(mean * group[:, None]).amax(dim=-1) for group in tables.members.unbind(dim=1)], dim=-1)
    share = (queries / queries.expand(columns.shape[1], -1).sum()).expand(columns.shape[1], -1)
    return (largest * share[:, None]).sum(dim=(1, 3))


def value_weighted(columns: Tensor, norms: Tensor, sizes: Tensor, tables: GridTables) -> Tensor:
    """Return value-weighted attention `[images, heads]`.

    Args:
        columns: Weights summed over patches `[images, windows, heads, keys]`.
        norms: Norms of the values, alike.
        sizes: Patches of each group `[windows, groups]`.
        tables: The layer's tables.
    """
    members = tables.members.expand(columns.shape[1], -1, -1)
    plain = torch.einsum("bwhk,wgk->bwhg", norms, members) / members.sum(dim=-1).clamp_min(1)[:, None]
    return (columns * norms).sum(dim=(1, 3)) / (plain * sizes[:, None]).sum(dim=(1, 3))
