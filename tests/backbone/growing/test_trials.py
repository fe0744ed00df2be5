"""Models get the shortcuts that are right for them, and wrong ones are seen; the oracle is a plain forward pass."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, PooledTokens, SharedCore, Shortcuts
from headprobe.backbone.growing.trials import find_shortcuts
from headprobe.backbone.growing.trials import growing_logits as logits_in_trial
from headprobe.backbone.sandbox import agree
from headprobe.errors import RunError, UsageError
from tests.backbone.growing.shortcut_cases import (
    DEPTH,
    SINGLE,
    TOKENS,
    Found,
    found_in,
    growing_logits,
    hold_to_plain_passes,
    masks,
    noise,
    plain_logits,
    setup,
    small,
)


def blocks_become(model: Any, kind: type[nn.Module]) -> Any:
    for block in model.blocks:
        block.__class__ = kind
    return model


def becomes(model: Any, kind: type[nn.Module]) -> Any:
    model.__class__ = kind
    return model


def entries(shortcuts: Shortcuts) -> list[str]:
    return [core.entry for _, core in shortcuts.cores]


NORMS = [f"blocks.{layer}.norm1" for layer in range(DEPTH)]
ATTENTIONS = [f"blocks.{layer}.attn" for layer in range(DEPTH)]


def test_a_plain_vit_gets_every_shortcut() -> None:
    shortcuts = setup()[1][2]
    assert entries(shortcuts) == NORMS
    assert shortcuts.pooled == PooledTokens("blocks.2", "blocks.2.norm1", 1, queries=True)


class LastTokenHead(VisionTransformer):  # type: ignore[misc]  # untyped in timm
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x[:, -1]


class MeanHead(VisionTransformer):  # type: ignore[misc]  # untyped in timm
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x + x.mean(dim=1, keepdim=True), pre_logits)


class SecondTokenHead(VisionTransformer):  # type: ignore[misc]  # untyped in timm
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return super().forward_head(x[:, min(1, x.shape[1] - 1) :], pre_logits)


class LateMixing(VisionTransformer):  # type: ignore[misc]  # untyped in timm
    """Tokens go into one another once more behind the last block."""

    def forward_features(self, x: Tensor, **more: Any) -> Tensor:
        x = super().forward_features(x, **more)
        return x.cumsum(dim=1) + x.flip(1)


@pytest.mark.parametrize("kind", [LastTokenHead, MeanHead, SecondTokenHead, LateMixing])
@torch.inference_mode()
def test_a_head_that_reads_other_tokens_keeps_them_all_whatever_global_pool_says(kind: type[nn.Module]) -> None:
    model = becomes(small(), kind)
    found = found_in(model)
    assert model.global_pool == "token"
    assert found[2].pooled is None
    assert entries(found[2]) == NORMS
    hold_to_plain_passes(model, found)


class ReadsBatchSize(Attention):  # type: ignore[misc]  # untyped in timm
    """Its rows are laid out by a number of rows that its block read."""

    rows = 0

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return super().forward(x.reshape(self.rows, -1, x.shape[-1]), **more)


class TellsBatchSize(Block):  # type: ignore[misc]  # untyped in timm
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        self.attn.rows = x.shape[0]
        return super().forward(x, **more)


@torch.inference_mode()
def test_an_attention_laid_out_by_its_blocks_number_of_rows_gets_no_shared_core() -> None:
    model = blocks_become(small(), TellsBatchSize)
    for block in model.blocks:
        block.attn.__class__ = ReadsBatchSize
    found = found_in(model)
    assert entries(found[2]) == []
    hold_to_plain_passes(model, found)


class UsesNormTwice(Block):  # type: ignore[misc]  # untyped in timm
    """Attention and MLP stand side by side on one norm."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        normed = self.norm1(x)
        return x + self.attn(normed) + self.mlp(normed) + self.norm2(x)


@torch.inference_mode()
def test_a_norm_whose_output_goes_two_ways_still_runs_on_all_rows() -> None:
    model = blocks_become(small(), UsesNormTwice)
    found = found_in(model)
    assert entries(found[2]) == ATTENTIONS
    hold_to_plain_passes(model, found)


class WithStream(Attention):  # type: ignore[misc]  # untyped in timm
    def forward(self, x: Tensor, stream: Tensor, **more: Any) -> Tensor:
        return super().forward(x + 0.1 * stream, **more)


class PassesStream(Block):  # type: ignore[misc]  # untyped in timm
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + self.attn(self.norm1(x), x)
        return x + self.mlp(self.norm2(x))


class PassesStreamByKeyword(Block):  # type: ignore[misc]  # untyped in timm
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + self.attn(self.norm1(x), stream=x)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("kind", [PassesStream, PassesStreamByKeyword])
@torch.inference_mode()
def test_attention_that_is_given_the_stream_too_shares_from_its_own_input_on(kind: type[nn.Module]) -> None:
    model = blocks_become(small(), kind)
    for block in model.blocks:
        block.attn.__class__ = WithStream
    found = found_in(model)
    assert entries(found[2]) == ATTENTIONS
    hold_to_plain_passes(model, found)


class InPlace(Block):  # type: ignore[misc]  # untyped in timm
    """Changes the stream that it was given, before and after its attention has read it."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + 0
        x.tanh_()
        x.add_(self.attn(self.norm1(x)))
        return x.add_(self.mlp(self.norm2(x)))


class InPlaceOnInput(Block):  # type: ignore[misc]  # untyped in timm
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x.tanh_()
        x.add_(self.attn(self.norm1(x)))
        return x.add_(self.mlp(self.norm2(x)))


@pytest.mark.parametrize("kind", [InPlace, InPlaceOnInput])
@torch.inference_mode()
def test_blocks_that_work_in_place_give_plain_logits(kind: type[nn.Module]) -> None:
    model = blocks_become(small(), kind)
    found = found_in(model)
    assert found[2].pooled is None  # the norm would be given the stream as it was before
    hold_to_plain_passes(model, found)


class BatchCentred(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0, keepdim=True))


class RowCounting(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * (len(x) > 2)


@pytest.mark.parametrize("kind", [BatchCentred, RowCounting])
@torch.inference_mode()
def test_a_norm_that_reads_the_batch_is_refused_before_any_shortcut_is_tried(kind: type[nn.Module]) -> None:
    model = small()
    for block in model.blocks:
        block.norm1.__class__ = kind
    with pytest.raises(UsageError, match="rows of one batch influence each other"):
        found_in(model)


@torch.inference_mode()
def test_a_distilled_model_keeps_both_tokens_that_it_pools() -> None:
    model = small("deit_tiny_distilled_patch16_224")
    found = found_in(model)
    assert found[2].pooled == PooledTokens("blocks.2", "blocks.2.norm1", 2, queries=True)
    hold_to_plain_passes(model, found)


class Checked(Block):  # type: ignore[misc]  # untyped in timm
    """Checks how many tokens it has, as hierarchical models do."""

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        halfway = x + self.attn(self.norm1(x), **more)
        torch._assert(halfway.shape[1] == TOKENS, "a token is missing")
        return halfway + self.mlp(self.norm2(halfway))


class Columns(Block):  # type: ignore[misc]  # untyped in timm
    """Cannot do with fewer tokens for another reason: it looks one up."""

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        x = super().forward(x, **more)
        return x + 0.01 * x[:, TOKENS - 1, None]


class ByKeyword(VisionTransformer):  # type: ignore[misc]  # untyped in timm
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            x = block(x=x)
        return self.norm(x)


@pytest.mark.parametrize("kind", [Checked, Columns])
@torch.inference_mode()
def test_a_block_that_fails_with_fewer_tokens_is_given_all(kind: type[nn.Module]) -> None:
    model = blocks_become(small(), kind)
    found = found_in(model)
    assert found[2].pooled is None
    assert entries(found[2]) == NORMS
    hold_to_plain_passes(model, found)


@torch.inference_mode()
def test_blocks_that_are_called_by_keyword_are_given_all_tokens() -> None:
    model = becomes(small(), ByKeyword)
    found = found_in(model)
    assert found[2].pooled is None
    hold_to_plain_passes(model, found)


@torch.inference_mode()
def test_where_attention_alone_is_masked_the_shortcuts_are_as_right() -> None:
    model = small()
    found = found_in(model, "attention")
    assert found[2].pooled is not None
    hold_to_plain_passes(model, found)


# -- wrong shortcuts ---------------------------------------------------------------------------------------------------


def other_core(number: int, **changed: Any) -> Shortcuts:
    shortcuts = setup()[1][2]
    cores = list(shortcuts.cores)
    module, core = cores[number]
    cores[number] = (module, replace(core, **changed))
    return replace(shortcuts, cores=tuple(cores))


def wrong_shortcuts() -> dict[str, Shortcuts]:
    pooled = PooledTokens("blocks.2", "blocks.2.norm1", 1, queries=True)
    return {
        "twice the rows per image": other_core(1, batched=(((0,), 2),)),
        "no argument is cut": other_core(1, batched=()),
        "put back at a later layer": other_core(1, layer=2),
        "put back at an earlier layer": other_core(1, layer=0),
        "left out at the MLP": other_core(1, entry="blocks.1.mlp"),
        "left out before the second norm": other_core(1, entry="blocks.1.norm2"),
        "pooled at the first block": Shortcuts(pooled=replace(pooled, block="blocks.0", entry="blocks.0.norm1")),
        "no token": Shortcuts(pooled=replace(pooled, tokens=0)),
        "all tokens come too late": Shortcuts(pooled=replace(pooled, entry="blocks.2.attn")),
    }


def right_in_trial(model: nn.Module, found: Found, shortcuts: Shortcuts) -> bool:
    """Say whether all that proved the joins is as it was."""
    layout, joins, _, companies = found
    assert companies
    for company in companies:
        try:
            logits = logits_in_trial(model, layout, joins, company.keep, company.images, shortcuts)
        except IndexError:
            return False
        if logits is None or not agree(logits, company.logits, *company.rounding):
            return False
    return True


@pytest.mark.parametrize("name", wrong_shortcuts())
@torch.inference_mode()
def test_a_wrong_shortcut_is_found_by_its_trial_and_never_scored_as_right(name: str) -> None:
    model, found = setup()
    layout = found[0]
    wrong = wrong_shortcuts()[name]
    assert not right_in_trial(model, found, wrong)
    try:
        logits = growing_logits(model, found, SINGLE, noise(2), wrong)
    except (RunError, RuntimeError, ValueError, IndexError):
        return
    expected = plain_logits(model, layout, SINGLE, noise(2))
    assert (logits - expected).abs().max() > 1e-3 * expected.abs().max()


@torch.inference_mode()
def test_one_token_too_few_is_found_by_the_trial() -> None:
    model = small("deit_tiny_distilled_patch16_224")
    found = found_in(model)
    shortcuts = found[2]
    assert shortcuts.pooled is not None
    assert right_in_trial(model, found, shortcuts)
    assert not right_in_trial(model, found, replace(shortcuts, pooled=replace(shortcuts.pooled, tokens=1)))


@torch.inference_mode()
def test_rows_that_are_never_put_back_are_an_error() -> None:
    model, found = setup()
    layout, joins, _, _ = found
    last = SharedCore(layer=0, entry="blocks.2.norm1", batched=(((0,), 1),))
    keep = masks([(2, 0)])
    with (
        GrowingPass(model, layout, joins, keep, Shortcuts(cores=(("blocks.2", last),))) as growing,
        pytest.raises((RunError, RuntimeError)),
    ):
        growing.logits(noise(2), growing.plan(2, 100))


def test_without_a_proof_there_are_no_shortcuts() -> None:
    model, (layout, joins, _, _) = setup()
    assert find_shortcuts(model, layout, joins, [], ()) == NO_SHORTCUTS
