"""Attention weights of one layer reduced to numbers per image and head, chunk by chunk, as they are recomputed.

Queries and keys are patches unless said otherwise, and weights between patches are renormalised to sum to 1 per query:
what a patch sends to prefix tokens is a number of its own. In shifted windows the tokens that can see each other form
groups (`TokenGrid.groups`); what is defined over a set of queries or keys is taken per group and averaged over queries.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headprobe.metrics.token_grid import GridTables, TokenGrid, tables_of

TINY = torch.finfo(torch.float32).tiny


class WeightsChunk(NamedTuple):
    """Attention weights of some rows and queries of a layer; a row is an image, or one window of one."""

    rows: slice  #: whole images
    queries: slice
    weights: Tensor  #: float32 `[rows, heads, queries, keys]`, over all keys


@dataclass(frozen=True)
class Reduction:
    """What one batch of a layer's attention comes to.

    Attributes:
        values: By statistic `[images, heads]`; statistics that are not defined in this layer are missing.
        aligned: Renormalised weights summed over images, float64 `[heads, windows, patches, patches]`, if asked for;
            windows that are all alike are summed.
    """

    values: dict[str, Tensor]
    aligned: Tensor | None


@torch.no_grad()
def reduce_attention(
    grid: TokenGrid,
    images: int,
    chunks: Iterable[WeightsChunk],
    value_norms: Tensor | None = None,
    aligned: bool = False,
) -> Reduction:
    """Reduce the attention weights of one layer and batch.

    Args:
        grid: Where the layer's tokens lie.
        images: Images of the batch.
        chunks: Every row and query once, queries of an image in ascending order.
        value_norms: Norms of the values after the output projection `[rows, heads, keys]`, for value-weighted
            attention.
        aligned: Also sum the weights over images, for offset maps.

    Definitions and sources, a = weights between patches, renormalised:
        `attention_distance_px`: sum over keys of a x distance between the patches' places, mean over queries
            (Dosovitskiy 2021, appendix D.7, https://arxiv.org/abs/2010.11929); `attention_distance_raw_px` the same
            without renormalising, as the code of probing-vits does.
        `entropy_nats`: - sum a ln a, mean over queries; `entropy_all_keys_nats` over all keys, prefix tokens included
            (in a pooling layer the queries are its learned ones).
        `mutual_information`: MI(query; key) / sqrt(H(query) H(key)) with p(query) = 1 / queries (Park 2023,
            https://arxiv.org/abs/2305.00729); 0 = all queries look alike, or at a single key.
        `confidence`: largest a, mean over queries (Voita 2019, https://arxiv.org/abs/1905.09418).
        `class_mass`, `register_mass`, `self_mass`: weight on the class token, on all other prefix tokens, on the query
            itself, not renormalised.
        `sink_mass`: largest over all keys of the mean over all queries, prefix tokens included in both.
        `value_weighted_attention`: mean over queries of sum over all keys of weight x ||W_O v||, over the plain mean of
            ||W_O v||: below 1, attention rests on keys with little to say (norms: Kobayashi 2020,
            https://arxiv.org/abs/2004.10102; heads that do nothing: Bondarenko 2023, https://arxiv.org/abs/2306.12929).
    """
    reducer: _Reducer | None = None
    for chunk in chunks:
        if reducer is None:
            reducer = _Reducer(grid, images, chunk.weights, aligned)
        reducer.add(chunk)
    if reducer is None:
        return Reduction({}, None)
    return reducer.finish(value_norms)


class _Reducer:
    """Accumulates the chunks of one layer and batch."""

    def __init__(self, grid: TokenGrid, images: int, like: Tensor, aligned: bool) -> None:
        heads, keys = like.shape[1], like.shape[3]
        self.grid, self.images, self.heads = grid, images, heads
        self.renormalised = grid.prefix > 0 or grid.padded
        self.tables = None if grid.pooled else tables_of(grid, like.device)
        self.queries = 0
        self.sums: dict[str, Tensor] = {}
        # per key: weights summed over prefix queries, over patches, and over patches renormalised
        self.columns = like.new_zeros(images, grid.windows, heads, 3, keys)
        groups = 1 if self.tables is None else self.tables.members.shape[1]
        self.entropy = like.new_zeros(images, grid.windows, heads, groups)  # summed over the patches of each group
        self.aligned: Tensor | None = None
        if aligned and self.tables is not None and self.tables.distance is not None:
            inside = grid.tokens - grid.prefix
            shape = (len(self.tables.distance), heads, inside, inside)
            self.aligned = like.new_zeros(shape, dtype=torch.float64)

    def add(self, chunk: WeightsChunk) -> None:
        """Reduce one chunk."""
        windows = self.grid.windows
        images = slice(chunk.rows.start // windows, chunk.rows.stop // windows)
        weights = torch.unflatten(chunk.weights, 0, (-1, windows))
        if self.tables is None:
            self.queries = max(self.queries, chunk.queries.stop)
            self.columns[images, ..., 0, :] += weights.sum(dim=-2)
            self._sum("entropy_all_keys_nats", images, -_a_ln_a(weights).sum(dim=-1))
            return
        before = max(self.grid.prefix - chunk.queries.start, 0)
        first, stop = chunk.queries.start + before - self.grid.prefix, chunk.queries.stop - self.grid.prefix
        inside = slice(first, max(first, stop))
        patches = _Patches(self.grid, self.tables, inside, weights[..., before:, :])
        self._add_columns(images, weights, before, patches)
        self._add_entropy(images, patches)
        self._add_patches(images, patches)

    def _add_columns(self, images: slice, weights: Tensor, before: int, patches: "_Patches") -> None:
        """Sum over queries, and over images the weights between patches."""
        columns = self.columns[images]
        columns[..., 0, :] += weights[..., :before, :].sum(dim=-2)
        shares = patches.keys
        if self.renormalised:
            shares = shares * (patches.real / patches.mass)[..., None]
            every = patches.all_keys * patches.real[..., None] if self.grid.padded else patches.all_keys
            columns[..., 1, :] += every.sum(dim=-2)
        columns[..., 2, self.grid.prefix :] += shares.sum(dim=-2)
        if self.aligned is not None:
            total = self.aligned[:, :, patches.inside]
            for image in shares.flatten(0, 1).unsqueeze(1) if len(self.aligned) == 1 else shares:
                total += image  # one by one: the sum does not depend on how images are batched

    def _add_entropy(self, images: slice, patches: "_Patches") -> None:
        a_ln_a, prefix = _a_ln_a(patches.all_keys), self.grid.prefix
        of_patches = a_ln_a[..., prefix:]
        if self.grid.padded:
            inside = (of_patches * patches.real_keys).sum(dim=-1)
            everything = of_patches.sum(dim=-1)
        else:
            inside = of_patches.sum(dim=-1)
            everything = inside + a_ln_a[..., :prefix].sum(dim=-1)
        entropy = (patches.mass.log() - inside / patches.mass) if self.renormalised else -inside
        self._sum("entropy_nats", images, entropy * patches.real)
        self._sum("entropy_all_keys_nats", images, -everything * patches.real)
        self.entropy[images] += torch.einsum("bwhq,wgq->bwhg", entropy * patches.real, patches.members)

    def _add_patches(self, images: slice, patches: "_Patches") -> None:
        """Sum what concerns weights between patches, and the masses."""
        keys, mass, real, grid = patches.keys, patches.mass, patches.real, self.grid
        self._sum("confidence", images, keys.amax(dim=-1) / mass * real)
        itself = keys.diagonal(offset=patches.inside.start, dim1=-2, dim2=-1)
        self._sum("self_mass", images, itself * real)
        if grid.class_token:
            self._sum("class_mass", images, patches.all_keys[..., 0])
        if grid.registers:
            registers = patches.all_keys[..., int(grid.class_token) : grid.prefix]
            self._sum("register_mass", images, registers.sum(dim=-1))
        if patches.distance is None:
            return
        pixels = (keys * patches.distance).sum(dim=-1) * real
        self._sum("attention_distance_px", images, pixels / mass)
        self._sum("attention_distance_raw_px", images, pixels)

    def _sum(self, name: str, images: slice, by_query: Tensor) -> None:
        """Add `[images, windows, heads, queries]` up per image and head."""
        if name not in self.sums:
            self.sums[name] = by_query.new_zeros(self.images, self.heads)
        self.sums[name][images] += by_query.sum(dim=(1, 3))

    def finish(self, value_norms: Tensor | None) -> Reduction:
        """Turn the sums into means over queries, and the sums per key into what they stand for."""
        if not self.renormalised:
            self.columns[..., 1, :] = self.columns[..., 2, :]
        if self.tables is None:
            values = {name: total / self.queries for name, total in self.sums.items()}
            values["sink_mass"] = self.columns[..., 0, :].amax(dim=(1, 3)) / self.queries
            return Reduction(values, None)
        values = {name: total / self.grid.patches for name, total in self.sums.items()}
        patch_members = (self.tables.members * self.tables.real[:, None])[..., self.grid.prefix :]
        shared = _mutual_information(self.columns[..., 2, self.grid.prefix :], self.entropy, patch_members)
        if shared is not None:
            values["mutual_information"] = shared
        values["sink_mass"] = _sink(self.columns[..., :2, :].sum(dim=-2), self.tables)
        if value_norms is not None:
            norms = torch.unflatten(value_norms, 0, (-1, self.grid.windows))
            sizes = patch_members.sum(dim=-1)
            values["value_weighted_attention"] = _value_weighted(self.columns[..., 1, :], norms, sizes, self.tables)
        return Reduction(values, self.aligned)


class _Patches:
    """The rows of a chunk whose queries are patches, with the tables' entries for them.

    `real`, `mass` and all others broadcast against `[images, windows, heads, queries(, keys)]`.
    """

    def __init__(self, grid: TokenGrid, tables: GridTables, inside: slice, weights: Tensor) -> None:
        self.inside = inside
        tokens = slice(inside.start + grid.prefix, inside.stop + grid.prefix)
        self.all_keys = weights
        self.real = tables.real[:, None, tokens]
        self.real_keys = tables.real[:, None, None, grid.prefix :]
        self.members = tables.members[..., tokens].expand(grid.windows, -1, -1)
        self.distance = None if tables.distance is None else tables.distance[:, None, inside]
        self.keys = weights[..., grid.prefix :]
        self.mass = weights.new_ones(())
        if grid.padded:
            self.keys = self.keys * self.real_keys
            self.mass = self.keys.sum(dim=-1) + (1 - self.real)  # padding may see padding only: 0 / 0 would spread
        elif grid.prefix:
            self.mass = self.keys.sum(dim=-1)


def _a_ln_a(weights: Tensor) -> Tensor:
    """Return a ln a, 0 where a is 0."""
    return weights.clamp_min(TINY).log_().mul_(weights)


def _mutual_information(shares: Tensor, entropy: Tensor, members: Tensor) -> Tensor | None:
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
    marginal = _a_ln_a(shares / size_of_key[:, None])
    of_key = -torch.einsum("bwhk,wgk->bwhg", marginal, members.expand(shares.shape[1], -1, -1))
    information = (of_key - entropy / sizes.clamp_min(1)[:, None]).clamp_min(0)
    scale = (of_key.clamp_min(0) * sizes.clamp_min(1).log()[:, None]).sqrt()
    normalised = torch.where(scale > 0, information / scale, 0.0)
    return (normalised * counted[:, None]).sum(dim=(1, 3)) / counted.sum()


def _sink(columns: Tensor, tables: GridTables) -> Tensor:
    """Return the sink mass `[images, heads]` from weights summed over all queries `[images, windows, heads, keys]`."""
    queries = (tables.members * tables.real[:, None]).sum(dim=-1)  # [windows, groups]
    mean = columns / torch.einsum("wg,wgk->wk", queries, tables.members).clamp_min(1)[:, None]
    largest = torch.stack([(mean * group[:, None]).amax(dim=-1) for group in tables.members.unbind(dim=1)], dim=-1)
    share = (queries / queries.expand(columns.shape[1], -1).sum()).expand(columns.shape[1], -1)
    return (largest * share[:, None]).sum(dim=(1, 3))


def _value_weighted(columns: Tensor, norms: Tensor, sizes: Tensor, tables: GridTables) -> Tensor:
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
