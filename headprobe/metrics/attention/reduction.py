"""Attention weights of one layer reduced to numbers per image and head, chunk by chunk, as they are recomputed.

Queries and keys are patches unless stated otherwise. Weights between patches are renormalised to sum to 1 per query:
what a patch sends to prefix tokens is a number of its own. In shifted windows the tokens that can attend to each other
form groups (`TokenGrid.groups`); what is defined over a set of queries or keys is taken per group and averaged over
queries.

Chunks are not kept. Each leaves numbers by query and sums over queries by key (`_Reducer.add`), from which all
statistics follow once per batch (`_Reducer.finish` and the functions at the end).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headprobe.metrics.attention.weights_chunk import FAINT, WeightsChunk, a_ln_a, a_ln_a_of, lift
from headprobe.metrics.token_grid import GridTables, TokenGrid, tables_of


@dataclass(frozen=True)
class Reduction:
    """What one batch of a layer's attention comes to.

    Attributes:
        values: By statistic `[images, heads]`; statistics that are not defined in this layer are missing.
        aligned: Renormalised weights summed over images, float64 `[windows, heads, patches, patches]`, if wanted;
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
        value_norms: Norms of the values after the output projection, `[rows, heads, keys]`, for value-weighted
            attention.
        aligned: Also sum the weights over images, for offset maps.

    Definitions and sources, a = weights between patches, renormalised:
        `attention_distance_px`: sum over keys of a x distance between the patches' places, mean over queries
            (Dosovitskiy 2021, appendix D.7, https://arxiv.org/abs/2010.11929); `attention_distance_raw_px` the same
            without renormalising, as the code of probing-vits does.
        `entropy_nats`: - sum a ln a, mean over queries; `entropy_all_keys_nats` over all keys, prefix tokens and the
            padding of windows included, of patch queries (the learned queries in a pooling layer, and all tokens where
            their places are unknown).
        `mutual_information`: MI(query; key) / sqrt(H(query) H(key)) with p(query) = 1 / queries (Park 2023,
            https://arxiv.org/abs/2305.00729); 0 = all queries look alike, or at a single key. Groups of one patch are
            left out of the mean over queries.
        `confidence`: largest a, mean over queries (Voita 2019, https://arxiv.org/abs/1905.09418).
        `class_mass`, `register_mass`, `self_mass`: weight on the class token, on all other prefix tokens, on the query
            itself, not renormalised.
        `sink_mass`: largest over all keys of the mean over all queries, prefix tokens included in both.
        `value_weighted_attention`: mean over queries of sum over all keys of weight x ||W_O v||, over the plain mean of
            ||W_O v||, a ratio of means; W_O includes a layer scale. Below 1, attention rests on keys with small values
            (norms: Kobayashi 2020, https://arxiv.org/abs/2004.10102; heads that do nothing: Bondarenko 2023,
            https://arxiv.org/abs/2306.12929).
    """
    reducer: _Reducer | None = None
    for chunk in chunks:
        if reducer is None:
            reducer = _Reducer(grid, images, chunk.weights.float(), aligned)
        reducer.add(chunk)
    if reducer is None:
        return Reduction({}, None)
    return reducer.finish(value_norms)


class _Reducer:
    """Accumulates the chunks of one layer and batch.

    Every pass over a chunk takes time, so there are few: sums over keys are kept by query, sums over queries are kept
    by key, and statistics are made of both once per batch.
    """

    def __init__(self, grid: TokenGrid, images: int, like: Tensor, aligned: bool) -> None:
        heads, keys = like.shape[1], like.shape[3]
        self.grid = grid
        self.tables = None if grid.anonymous else tables_of(grid, like.device)
        self.queries = 0
        self.by_query: dict[str, Tensor] = {}  # each [images, windows, heads, queries], patches only
        self.entropy = like.new_zeros(images, heads)  # of anonymous tokens, summed over queries

        # weights of each key summed over prefix queries, over patches, and over patches renormalised
        self.columns = like.new_zeros(images, grid.windows, heads, 3, keys)

        self.distance: Tensor | None = None  # pixels to every key, 0 to a prefix token, [w, 1, patches, all keys]
        if self.tables is not None and self.tables.distance is not None:
            self.distance = F.pad(self.tables.distance, (grid.prefix, 0))[:, None]

        self.aligned: Tensor | None = None
        if aligned and self.distance is not None:
            inside = grid.tokens - grid.prefix
            shape = (len(self.distance), heads, inside, inside)  # one entry for windows that are all alike
            self.aligned = like.new_zeros(shape, dtype=torch.float64)

    def add(self, chunk: WeightsChunk) -> None:
        """Reduce one chunk."""
        windows = self.grid.windows
        chunk = chunk.single()
        images = slice(chunk.rows.start // windows, chunk.rows.stop // windows)
        weights = torch.unflatten(chunk.weights, 0, (-1, windows))  # [images, windows, heads, queries, keys]
        logs = None if chunk.logs is None else torch.unflatten(chunk.logs, 0, (-1, windows))
        self.queries = max(self.queries, chunk.queries.stop)
        if self.tables is None:
            self._add_anonymous(images, weights, logs)
            return

        # the chunk's queries are `before` prefix tokens, then patches; `first` and `stop` count patches
        before = max(self.grid.prefix - chunk.queries.start, 0)
        first, stop = chunk.queries.start + before - self.grid.prefix, chunk.queries.stop - self.grid.prefix
        logs = None if logs is None else logs[..., before:, :]
        patches = _Patches(self.grid, self.tables, slice(first, max(first, stop)), weights[..., before:, :], logs)
        if chunk.largest is not None and not patches.lifted and not self.grid.padded:
            patches.largest = torch.unflatten(chunk.largest, 0, (-1, windows))[..., before:]
        else:
            patches.largest = patches.keys.amax(dim=-1)

        terms = a_ln_a_of(patches.all_keys, logs)
        self._add_entropy(images, patches, terms)
        self._add_columns(images, weights, before, patches)
        self._add_patches(images, patches, scratch=terms)  # they are not needed any more

    def _add_anonymous(self, images: slice, weights: Tensor, logs: Tensor | None) -> None:
        """Reduce a chunk of a layer with unknown patches: sums by key, and entropies over all keys."""
        total = weights.new_ones(()) if logs is None else weights.sum(dim=-1, keepdim=True)
        self.columns[images, ..., 0, :] += (weights / total).sum(dim=-2)
        terms = a_ln_a_of(weights, logs).sum(dim=-1, keepdim=True)
        self.entropy[images] += (total.log() - terms / total).sum(dim=(1, 3, 4))

    def _add_entropy(self, images: slice, patches: "_Patches", terms: Tensor) -> None:
        """Keep sums of w ln w by query, between patches and over all keys.

        Args:
            images: Images of the chunk.
            patches: Its patch queries.
            terms: `[images, windows, heads, queries, keys]`.
        """
        prefix = self.grid.prefix
        of_patches = terms[..., prefix:]
        if self.grid.padded:  # padded windows have no prefix tokens; all keys are patches and padding
            inside = (of_patches * patches.real_keys).sum(dim=-1)
            everything = of_patches.sum(dim=-1)
        else:
            inside = of_patches.sum(dim=-1)
            everything = inside + terms[..., :prefix].sum(dim=-1)
        self._keep("inside", images, patches.inside, inside)
        self._keep("everything", images, patches.inside, everything)

    def _add_columns(self, images: slice, weights: Tensor, before: int, patches: "_Patches") -> None:
        """Sum over queries in three ways, with one product."""
        # [images, windows, heads, 3, queries] @ [images, windows, heads, queries, keys]
        factors = weights.new_zeros(*weights.shape[:3], 3, weights.shape[3])
        factors[..., 0, :before] = 1 / weights[..., :before, :].sum(dim=-1) if patches.scaled else 1
        factors[..., 1, before:] = patches.real / patches.total
        factors[..., 2, before:] = patches.real / patches.mass
        self.columns[images] += factors @ weights

    def _add_patches(self, images: slice, patches: "_Patches", scratch: Tensor) -> None:
        """Keep by query what concerns weights between patches, and the masses; sum the weights over images.

        Args:
            images: Images of the chunk.
            patches: Its patch queries.
            scratch: Memory in the shape of their weights, to be overwritten.
        """
        keys, grid, inside = patches.keys, self.grid, patches.inside
        self._keep("mass", images, inside, patches.mass)
        self._keep("total", images, inside, patches.total)
        self._keep("largest", images, inside, patches.largest)
        self._keep("self_mass", images, inside, keys.diagonal(offset=inside.start, dim1=-2, dim2=-1))
        if grid.class_token:
            self._keep("class_mass", images, inside, patches.all_keys[..., 0])
        if grid.registers:
            registers = patches.all_keys[..., int(grid.class_token) : grid.prefix]
            self._keep("register_mass", images, inside, registers.sum(dim=-1))
        if self.distance is not None:
            # over all keys, as prefix tokens and padding are 0 pixels away: rows without gaps are faster
            pixels = torch.mul(patches.all_keys, self.distance[:, :, inside], out=scratch).sum(dim=-1)
            self._keep("pixels", images, inside, pixels)
        if self.aligned is not None:
            self._add_aligned(self.aligned[:, :, inside], keys, patches.real / patches.mass)

    @staticmethod
    def _add_aligned(total: Tensor, keys: Tensor, factors: Tensor) -> None:
        """Add renormalised weights, image by image and in float64: the sum does not depend on batches.

        Args:
            total: `[windows, heads, queries, keys]`, where the weights are added up; one entry where windows are alike.
            keys: Weights between patches, `[images, windows, heads, queries, keys]`.
            factors: What makes those of a query sum to 1, `[images or 1, windows or 1, heads or 1, queries]`.
        """
        factors = factors.expand(keys.shape[:-1])[..., None]
        for image, factor in zip(keys, factors, strict=True):
            if len(total) < len(image):
                total += (image * factor).sum(dim=0, keepdim=True, dtype=torch.float64)
            else:
                total.addcmul_(image, factor)

    def _keep(self, name: str, images: slice, queries: slice, values: Tensor) -> None:
        """Note values `[images, windows, heads, queries]` of some images and patch queries."""
        if name not in self.by_query:
            patches = self.grid.tokens - self.grid.prefix
            self.by_query[name] = self.columns.new_zeros(*self.columns.shape[:3], patches)
        self.by_query[name][images, ..., queries] = values

    def finish(self, value_norms: Tensor | None) -> Reduction:
        """Turn what was kept by query into means over queries, and the sums by key into what they stand for."""
        if self.tables is None:
            sinks = self.columns[..., 0, :].amax(dim=3).mean(dim=1)
            entropy = self.entropy / self.grid.windows
            return Reduction({"entropy_all_keys_nats": entropy / self.queries, "sink_mass": sinks / self.queries}, None)

        prefix, real = self.grid.prefix, self.tables.real[:, None, self.grid.prefix :]  # [windows or 1, 1, patches]
        of_query = self._statistics()
        values = {name: (value * real).sum(dim=(1, 3)) / self.grid.patches for name, value in of_query.items()}

        members = self.tables.members * self.tables.real[:, None]
        patch_members = members[..., prefix:]  # [windows or 1, groups, patches], padding left out
        entropy = torch.einsum("bwhq,wgq->bwhg", of_query["entropy_nats"] * real, self._by_window(patch_members))
        shared = mutual_information(self.columns[..., 2, prefix:] * real, entropy, patch_members)
        if shared is not None:
            values["mutual_information"] = shared

        values["sink_mass"] = sink(self.columns[..., :2, :].sum(dim=-2), self.tables)
        if value_norms is not None:
            norms = torch.unflatten(value_norms, 0, (-1, self.grid.windows))  # [images, windows, heads, keys]
            sizes = patch_members.sum(dim=-1)
            values["value_weighted_attention"] = value_weighted(self.columns[..., 1, :], norms, sizes, self.tables)
        return Reduction(values, self.aligned)

    def _statistics(self) -> dict[str, Tensor]:
        """Return the statistics that are means over queries, by query."""
        kept, mass, total = self.by_query, self.by_query["mass"], self.by_query["total"]
        masses = ("self_mass", "class_mass", "register_mass")
        found: dict[str, Tensor] = {name: kept[name] / total for name in masses if name in kept}
        found["confidence"] = kept["largest"] / mass
        # with a = w / mass: - sum a ln a = ln(mass) - sum w ln w / mass
        found["entropy_nats"] = mass.log() - kept["inside"] / mass
        found["entropy_all_keys_nats"] = total.log() - kept["everything"] / total
        if "pixels" in kept:
            found["attention_distance_px"] = kept["pixels"] / mass
            found["attention_distance_raw_px"] = kept["pixels"] / total
        return found

    def _by_window(self, table: Tensor) -> Tensor:
        """Return `[windows or 1, ...]` as `[windows, ...]`."""
        return table.expand(self.grid.windows, *table.shape[1:])


class _Patches:
    """The queries of a chunk that are patches, with the tables' entries for them.

    `w` is windows, or 1 where all windows are alike. Weights are up to a factor of each query.

    Attributes:
        inside: Their numbers among the patches of a row.
        all_keys: Weights `[images, windows, heads, queries, all keys]`.
        keys: Weights between patches, 0 to padding, `[images, windows, heads, queries, keys]`.
        mass: What a query gives to patches, `[images, windows, heads, queries]`; `[]` where it is 1.
        total: What it gives to all keys, alike.
        largest: Its largest weight on a patch, `[images, windows, heads, queries]`.
        real: 1 for queries that are no padding, `[w, 1, queries]`.
        real_keys: 1 for keys that are no padding, `[w, 1, 1, keys]`.
        scaled: Whether the weights have a factor: without their logarithms each query's sum to 1.
        lifted: Whether weights were changed where prefix tokens left patches next to nothing.
    """

    largest: Tensor

    def __init__(
        self, grid: TokenGrid, tables: GridTables, inside: slice, weights: Tensor, logs: Tensor | None
    ) -> None:
        self.inside, self.all_keys, self.scaled, self.lifted = inside, weights, logs is not None, False
        self.real = tables.real[:, None, inside.start + grid.prefix : inside.stop + grid.prefix]
        self.real_keys = tables.real[:, None, None, grid.prefix :]

        self.keys = weights[..., grid.prefix :]
        self.mass = self.total = weights.new_ones(())
        if grid.padded:
            self.total = self.total if logs is None else self.keys.sum(dim=-1)
            self.keys = self.keys * self.real_keys
            # padding may attend to padding only: 0 / 0 would spread
            self.mass = self.keys.sum(dim=-1) + (1 - self.real)
        elif grid.prefix or logs is not None:
            self.mass = self.total = self.keys.sum(dim=-1)
        if grid.prefix:
            self._add_prefix(weights[..., : grid.prefix], None if logs is None else logs[..., grid.prefix :])

    def _add_prefix(self, weights: Tensor, logs: Tensor | None) -> None:
        """Add weights on prefix tokens; where they leave patches next to nothing, restore the shape of what is left.

        Args:
            weights: On prefix tokens, `[images, windows, heads, queries, prefix tokens]`.
            logs: Logarithms of the weights between patches, if they are known.
        """
        if logs is None:
            self.total = weights.new_ones(())
            return
        self.total = self.mass + weights.sum(dim=-1)
        faint = self.mass < FAINT * self.total
        if bool(faint.any()):
            lift(self.keys, logs, faint, self.total)
            self.mass, self.lifted = self.keys.sum(dim=-1), True


def mutual_information(shares: Tensor, entropy: Tensor, members: Tensor) -> Tensor | None:
    """Return the normalised mutual information of query and key `[images, heads]`, None where no two patches meet.

    Args:
        shares: Renormalised weights summed over queries, `[images, windows, heads, keys]`.
        entropy: Entropies of the queries' weights, summed over each group, `[images, windows, heads, groups]`.
        members: `[windows or 1, groups, keys]`, 1 where a patch is in the group.
    """
    windows = shares.shape[1]
    sizes = members.sum(dim=-1)  # patches of each group, [windows or 1, groups]
    counted = torch.where(sizes > 1, sizes, 0.0).expand(windows, -1)
    if not float(counted.sum()):
        return None

    # entropy of the key, for queries drawn evenly from the group
    size_of_key = torch.einsum("wg,wgk->wk", sizes, members).clamp_min(1)
    marginal = a_ln_a(shares / size_of_key[:, None])
    of_key = -torch.einsum("bwhk,wgk->bwhg", marginal, members.expand(windows, -1, -1))

    # less its mean entropy for a known query: the information
    information = (of_key - entropy / sizes.clamp_min(1)[:, None]).clamp_min(0)
    scale = (of_key.clamp_min(0) * sizes.clamp_min(1).log()[:, None]).sqrt()
    normalised = torch.where(scale <= 0, 0.0, information / scale)  # NaN stays NaN
    return (normalised * counted[:, None]).sum(dim=(1, 3)) / counted.sum()


def sink(columns: Tensor, tables: GridTables) -> Tensor:
    """Return the sink mass `[images, heads]`: the largest over keys of the mean weight over queries, group by group.

    Args:
        columns: Weights summed over all queries, `[images, windows, heads, keys]`.
        tables: The layer's tables.
    """
    windows = columns.shape[1]
    queries = (tables.members * tables.real[:, None]).sum(dim=-1)  # of each group, [windows or 1, groups]
    mean = columns / torch.einsum("wg,wgk->wk", queries, tables.members).clamp_min(1)[:, None]
    by_group = [(mean * group[:, None]).amax(dim=-1) for group in tables.members.unbind(dim=1)]
    largest = torch.stack(by_group, dim=-1)  # [images, windows, heads, groups]
    share = (queries / queries.expand(windows, -1).sum()).expand(windows, -1)  # of all queries
    return (largest * share[:, None]).sum(dim=(1, 3))


def value_weighted(columns: Tensor, norms: Tensor, sizes: Tensor, tables: GridTables) -> Tensor:
    """Return value-weighted attention `[images, heads]`.

    Args:
        columns: Weights summed over patches, `[images, windows, heads, keys]`.
        norms: Norms of the values, `[images, windows, heads, keys]`.
        sizes: Patches of each group, `[windows or 1, groups]`.
        tables: The layer's tables.
    """
    members = tables.members.expand(columns.shape[1], -1, -1)
    # mean norm over the keys of each group, [images, windows, heads, groups]
    plain = torch.einsum("bwhk,wgk->bwhg", norms, members) / members.sum(dim=-1).clamp_min(1)[:, None]
    return (columns * norms).sum(dim=(1, 3)) / (plain * sizes[:, None]).sum(dim=(1, 3))
