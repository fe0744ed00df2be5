"""Smallest representatives of every attention class that occurs in timm's registered models."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVitCfg
from timm.models.vision_transformer import ParallelScalingBlock

from tests.conftest import perturbed


@dataclass(frozen=True)
class Representative:
    name: str
    options: dict[str, Any]
    input_size: tuple[int, int, int]
    classes: tuple[str, ...]
    """Full paths of the attention classes that it contains."""
    heads: tuple[int, ...]
    """Heads of each layer in the order of execution, read from timm's sources."""
    noise: float = 0.1
    """Standard deviation of the noise on every parameter: deep convolutions blow up under 0.1."""
    sizes: dict[str, Any] | None = None
    """Sizes in the place of those that timm fixes for the name: at full width a single test takes ten seconds."""


ATTENTION = "timm.layers.attention.Attention"
ROPE = "timm.layers.attention.AttentionRope"
LATENT_POOL = "timm.layers.attention_pool.AttentionPoolLatent"
EVA = "timm.models.eva.EvaAttention"
PARALLEL = "timm.models.vision_transformer.ParallelScalingBlock"
RELPOS = "timm.models.vision_transformer_relpos.RelPosAttention"
MULTI_QUERY = "timm.layers.attention2d.MultiQueryAttention2d"
LEVIT = ("timm.models.levit.Attention", "timm.models.levit.AttentionDownsample")
COAT = ("timm.models.coat.FactorAttnConvRelPosEnc",)
MVIT = ("timm.models.mvitv2.MultiScaleAttention",)
GEMMA = ("timm.models.gemma4_vit.Gemma4Attention",)
ATTENTION_2D = "timm.models.maxxvit.Attention2d"
ATTENTION_CL = "timm.models.maxxvit.AttentionCl"
LAMBDA = ("timm.layers.lambda_layer.LambdaLayer",)
LOWFORMER = ("timm.models.lowformer.ConvAttention",)
LITE_MLA = ("timm.models.efficientvit_mit.LiteMLA",)
PVT = ("timm.models.pvt_v2.Attention",)

SMALL: dict[str, Any] = {"embed_dim": 48, "num_heads": 4, "depth": 2}
"""Four heads of 12 channels: neither the batch of three images nor the number of layers."""

VIT: dict[str, Any] = {**SMALL, "img_size": 64}

SWIN: dict[str, Any] = {"img_size": (64, 96), "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
"""24 and 6 windows of 16 tokens, and every second block shifts them."""

MAXVIT: dict[str, Any] = {
    "img_size": 96,
    "embed_dim": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "stem_width": 16,
    "transformer_dim_head": 8,
}

REPRESENTATIVES: dict[str, Representative] = {
    # ---- plain vision transformers: timm.layers.attention
    # one class token
    "vit": Representative("vit_tiny_patch16_224", VIT, (3, 64, 64), (ATTENTION,), (4, 4)),
    # a class token and four registers
    "vit_registers": Representative(
        "vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 56}, (3, 56, 56), (ATTENTION,), (4, 4)
    ),
    # a class and a distillation token, two classifiers
    "vit_distilled": Representative("deit_tiny_distilled_patch16_224", VIT, (3, 64, 64), (ATTENTION,), (4, 4)),
    # no class token, mean over the patches
    "vit_mean": Representative("vit_medium_patch16_gap_256", VIT, (3, 64, 64), (ATTENTION,), (4, 4)),
    # a register and no class token, all tokens pooled by attention from a latent query
    "vit_latent_pool": Representative(
        "test_vit3", {**VIT, "num_heads": 6}, (3, 64, 64), (ATTENTION, LATENT_POOL), (6, 6, 6)
    ),
    # the patches alone, pooled by attention from a latent query
    "siglip": Representative("vit_base_patch16_siglip_224", VIT, (3, 64, 64), (ATTENTION, LATENT_POOL), (4, 4, 4)),
    # built for square images, run on others: 24 patches
    "vit_dynamic": Representative(
        "vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True}, (3, 64, 96), (ATTENTION,), (4, 4)
    ),
    # a norm over all heads before the output projection
    "vit_scale_norm": Representative("beit3_base_patch16_224", VIT, (3, 64, 64), (ATTENTION,), (4, 4)),
    # a norm before the blocks
    "clip": Representative("vit_base_patch16_clip_224", VIT, (3, 64, 64), (ATTENTION,), (4, 4)),
    # two attentions side by side in every block
    "vit_side_by_side": Representative("vit_small_patch16_18x2_224", VIT, (3, 64, 64), (ATTENTION,), (4, 4, 4, 4)),
    # attention and MLP in parallel, each with an output projection
    "vit_parallel": Representative("vit_pwee_patch16_reg1_gap_256", VIT, (3, 64, 64), (PARALLEL,), (4, 4)),
    # attention and MLP in parallel under one output projection
    "vit_parallel_fused": Representative(
        "vit_pwee_patch16_reg1_gap_256",
        {**VIT, "block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)},
        (3, 64, 64),
        (PARALLEL,),
        (4, 4),
    ),
    # difference of two attentions per head
    "vit_differential": Representative(
        "vit_dwee_patch16_reg1_gap_256", VIT, (3, 64, 64), ("timm.layers.diff_attention.DiffAttention",), (4, 4)
    ),
    # the same in parallel with the MLP
    "vit_differential_parallel": Representative(
        "vit_dpwee_patch16_reg1_gap_256",
        VIT,
        (3, 64, 64),
        ("timm.models.vision_transformer.DiffParallelScalingBlock",),
        (4, 4),
    ),
    # patches from a convolutional stem
    "vit_hybrid": Representative("vit_tiny_r_s16_p8_224", VIT, (3, 64, 64), (ATTENTION,), (4, 4)),
    # tokens are pooled between stages
    "pit": Representative(
        "pit_ti_224",
        {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (2, 4, 8)},
        (3, 64, 64),
        (ATTENTION,),
        (2, 4, 8),
    ),
    # patches come as a list of any length
    "naflex": Representative("naflexvit_base_patch16_gap", SMALL, (3, 64, 96), (ATTENTION,), (4, 4)),
    "naflex_latent_pool": Representative(
        "naflexvit_base_patch16_siglip", SMALL, (3, 64, 96), (ATTENTION, LATENT_POOL), (4, 4, 4)
    ),
    # a sigmoid gate on the concatenated heads, which no registered name switches on by itself
    "naflex_gated": Representative(
        "naflexvit_base_patch16_gap", {**SMALL, "attn_gated": True}, (3, 64, 96), (EVA,), (4, 4)
    ),
    # ---- rotary positions
    "rope": Representative("vit_small_patch16_rope_224", VIT, (3, 64, 64), (ROPE,), (4, 4)),
    # rotary positions learned per head
    "rope_mixed": Representative("vit_small_patch16_rope_mixed_224", VIT, (3, 64, 64), (ROPE,), (4, 4)),
    # two heads share keys and values in the middle block
    "rope_grouped_query": Representative(
        "vit_base_patch16_sapiens2", {**VIT, "depth": 3, "num_kv_heads": (4, 2, 4)}, (3, 64, 64), (ROPE,), (4, 4, 4)
    ),
    # rotary positions and latent pooling, whose eight heads are not the blocks' four
    "rope_latent_pool": Representative(
        "vit_pe_core_tiny_patch16_384", VIT, (3, 64, 64), (ROPE, LATENT_POOL), (4, 4, 8)
    ),
    "deepseek": Representative("deepseek_vit_412m", {**SMALL, "img_size": 84}, (3, 84, 84), (ROPE,), (4, 4)),
    # positions resampled from a square grid
    "qwen": Representative("qwen3_vit_88m", VIT, (3, 64, 96), (ROPE,), (4, 4)),
    "eva": Representative("eva02_tiny_patch14_224", {**SMALL, "img_size": 56}, (3, 56, 56), (EVA,), (4, 4)),
    # a norm over all heads before the output projection
    "eva_scale_norm": Representative("eva02_base_patch16_clip_224", VIT, (3, 64, 64), (EVA,), (4, 4)),
    # registers, rotary positions, any image size
    "dinov3": Representative("vit_small_patch16_dinov3", VIT, (3, 64, 96), (EVA,), (4, 4)),
    "gemma": Representative(
        "gemma4_vit_167m",
        {**VIT, "head_dim": 12, "intermediate_size": 96, "position_embedding_size": 64},
        (3, 64, 64),
        GEMMA,
        (4, 4),
    ),
    # two heads share keys and values
    "gemma_grouped_query": Representative(
        "gemma4_vit_167m",
        {**VIT, "head_dim": 12, "intermediate_size": 96, "position_embedding_size": 64, "num_kv_heads": 2},
        (3, 64, 64),
        GEMMA,
        (4, 4),
    ),
    # ---- relative positions
    "beit": Representative("beit_base_patch16_224", VIT, (3, 64, 64), ("timm.models.beit.Attention",), (4, 4)),
    # biases from an MLP, no class token
    "relpos": Representative("vit_relpos_small_patch16_224", VIT, (3, 64, 64), (RELPOS,), (4, 4)),
    # biases from a table, class token
    "relpos_class_token": Representative(
        "vit_relpos_base_patch16_cls_224", {**VIT, "rel_pos_type": "bias"}, (3, 64, 64), (RELPOS,), (4, 4)
    ),
    # no biases of its own: every block is handed the same ones
    "relpos_shared": Representative("vit_srelpos_small_patch16_224", VIT, (3, 64, 64), (RELPOS,), (4, 4)),
    # ---- windows
    "swin": Representative(
        "swin_tiny_patch4_window7_224",
        SWIN,
        (3, 64, 96),
        ("timm.models.swin_transformer.WindowAttention",),
        (2, 2, 4, 4),
    ),
    "swin_v2": Representative(
        "swinv2_tiny_window8_256",
        SWIN,
        (3, 64, 96),
        ("timm.models.swin_transformer_v2.WindowAttention",),
        (2, 2, 4, 4),
    ),
    "swin_v2_cr": Representative(
        "swinv2_cr_tiny_224",
        SWIN,
        (3, 64, 96),
        ("timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",),
        (2, 2, 4, 4),
    ),
    # four windows, padded, in the first block; all tokens in the second
    "sam": Representative(
        "samvit_base_patch16",
        {**SMALL, "num_heads": 6, "img_size": 96, "window_size": 4, "global_attn_indexes": (1,), "neck_chans": 32},
        (3, 96, 96),
        ("timm.models.vision_transformer_sam.Attention",),
        (6, 6),
    ),
    # windows that shrink as queries are pooled, and one global block
    "sam2": Representative(
        "sam2_hiera_tiny",
        {
            "embed_dim": 24,
            "num_heads": 2,
            "stages": (1, 2, 2, 1),
            "window_spec": (8, 4, 4, 2),
            "global_att_blocks": (4,),
        },
        (3, 64, 96),
        ("timm.models.hieradet_sam2.MultiScaleAttention",),
        (2, 4, 4, 8, 8, 16),
    ),
    # six mask units per image in the first two stages, all tokens in the others
    "hiera": Representative(
        "hiera_tiny_224",
        {"img_size": (64, 96), "embed_dim": 24, "num_heads": 2, "stages": (1, 2, 2, 1)},
        (3, 64, 96),
        ("timm.models.hiera.MaskUnitAttention",),
        (2, 4, 4, 8, 8, 16),
    ),
    # channels interleave heads; 16, 4, 1 blocks per image
    "nest": Representative(
        "nest_tiny",
        {"img_size": 96, "mlp_ratio": 1.0},
        (3, 96, 96),
        ("timm.models.nest.Attention",),
        (3,) * 2 + (6,) * 2 + (12,) * 2,
        sizes={"embed_dims": (48, 96, 192), "depths": (2, 2, 2)},
    ),
    # windows, padded and cropped, alternate with subsampled keys
    "twins": Representative(
        "twins_svt_small",
        {"img_size": (64, 96), "embed_dims": (16, 24, 32, 64), "num_heads": (2, 6, 4, 8), "depths": (2, 2, 2, 2)},
        (3, 64, 96),
        ("timm.models.twins.LocallyGroupedAttn", "timm.models.twins.GlobalSubSampleAttn"),
        (2, 2, 6, 6, 4, 4, 8, 8),
    ),
    # subsampled keys alone
    "twins_pcpvt": Representative(
        "twins_pcpvt_small",
        {"img_size": 64, "embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8), "depths": (1, 1, 1, 1)},
        (3, 64, 64),
        ("timm.models.twins.GlobalSubSampleAttn",),
        (1, 2, 5, 8),
    ),
    # windows of local and of global queries alternate
    "gcvit": Representative(
        "gcvit_xxtiny",
        {"img_size": (64, 96), "embed_dim": 16, "window_size": ((4, 6), (2, 3), (2, 3), (2, 3))},
        (3, 64, 96),
        ("timm.models.gcvit.WindowAttentionGlobal",),
        (2,) * 2 + (4,) * 2 + (8,) * 6 + (16,) * 2,
    ),
    # windows, the second stage's padded
    "tiny_vit": Representative(
        "tiny_vit_5m_224",
        {
            "embed_dims": (16, 24, 32, 48),
            "depths": (1, 1, 2, 1),
            "num_heads": (2, 4, 2, 6),
            "window_sizes": (4, 4, 3, 2),
        },
        (3, 64, 96),
        ("timm.models.tiny_vit.Attention",),
        (4, 2, 2, 6),
        noise=0.2,
    ),
    # windows of tokens alternate with attention between channels
    "davit": Representative(
        "davit_tiny",
        {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 4), "window_size": 4},
        (3, 64, 96),
        ("timm.models.davit.WindowAttention", "timm.models.davit.ChannelAttention"),
        (2, 2, 4, 4),
    ),
    # Florence-2's: the other attention between channels, windows padded
    "davit_fl": Representative(
        "davit_base_fl",
        {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (2, 6), "window_size": 6},
        (3, 64, 96),
        ("timm.models.davit.WindowAttention", "timm.models.davit.ChannelAttentionV2"),
        (2, 2, 6, 6),
    ),
    # windows and grids alternate
    "maxvit": Representative(
        "test_maxvit",
        {"img_size": 96, "transformer_dim_head": 16},
        (3, 96, 96),
        (ATTENTION_CL,),
        (2, 2, 4, 4, 6, 6, 8, 8),
    ),
    # windows and grids side by side
    "maxvit_parallel": Representative(
        "maxvit_tiny_pm_256",
        MAXVIT,
        (3, 96, 96),
        (ATTENTION_CL,),
        (2, 2, 4, 4, 6, 6, 8, 8),
    ),
    # the published models' order of queries, keys and values
    "maxvit_tf": Representative(
        "maxvit_tiny_tf_224",
        MAXVIT,
        (3, 96, 96),
        (ATTENTION_CL,),
        (2, 2, 4, 4, 6, 6, 8, 8),
    ),
    # channels first, all tokens
    "coatnet": Representative(
        "test_coatnet",
        {"img_size": 64, "transformer_dim_head": 16},
        (3, 64, 64),
        (ATTENTION_2D,),
        (4, 6, 6),
        noise=0.12,
    ),
    # one matmul per head, each fed by the head before; windows padded
    "efficientvit_msra": Representative(
        "efficientvit_m0",
        {
            "img_size": 128,
            "embed_dim": (32, 48, 64),
            "key_dim": (8, 8, 8),
            "depth": (1, 1, 2),
            "num_heads": (4, 2, 4),
            "window_size": (3, 3, 2),
        },
        (3, 128, 128),
        ("timm.models.efficientvit_msra.CascadedGroupAttention",),
        (4, 2, 4, 4),
        noise=0.15,
    ),
    # ---- class attention, talking heads, other attentions between tokens
    "cait": Representative(
        "cait_xxs24_224",
        VIT,
        (3, 64, 64),
        ("timm.models.cait.TalkingHeadAttn", "timm.models.cait.ClassAttn"),
        (4, 4, 4, 4),
    ),
    # attention between channels, then class attention
    "xcit": Representative(
        "xcit_nano_12_p16_224",
        VIT,
        (3, 64, 64),
        ("timm.models.xcit.XCA", "timm.models.cait.ClassAttn"),
        (4, 4, 4, 4),
        noise=0.15,
    ),
    # windows of neighbours, then all tokens, then class attention
    "volo": Representative(
        "volo_d1_224",
        {"img_size": 64, "mlp_ratio": 1.0, "stem_hidden_dim": 16},
        (3, 64, 64),
        ("timm.models.volo.OutlookAttention", "timm.models.volo.Attention", "timm.models.volo.ClassAttention"),
        (2, 4, 4, 4, 4, 4),
        sizes={"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48), "num_heads": (2, 4, 4, 4)},
    ),
    # two branches of 16 and 9 patches whose class tokens attend to each other's
    "crossvit": Representative(
        "crossvit_tiny_240",
        {
            "img_size": 48,
            "img_scale": (1.0, 1.0),
            "embed_dim": (24, 48),
            "num_heads": (2, 4),
            "depth": ((1, 2, 0), (1, 1, 0)),
        },
        (3, 48, 48),
        (ATTENTION, "timm.models.crossvit.CrossAttention"),
        (2, 4, 4, 4, 2, 2, 4, 4, 2),
    ),
    # serial blocks, then one that runs three scales side by side
    "coat": Representative(
        "coat_tiny",
        {
            "img_size": 64,
            "embed_dims": (48,) * 4,
            "serial_depths": (1,) * 4,
            "parallel_depth": 1,
            "mlp_ratios": (1,) * 4,
        },
        (3, 64, 64),
        COAT,
        (8,) * 7,
    ),
    # serial blocks alone
    "coat_lite": Representative(
        "coat_lite_tiny",
        {"img_size": 64, "embed_dims": (16, 24, 32, 48), "serial_depths": (1,) * 4},
        (3, 64, 64),
        COAT,
        (8,) * 4,
    ),
    "convit": Representative(
        "convit_tiny",
        {"img_size": 64, "embed_dim": 12, "depth": 3, "local_up_to_layer": 2},
        (3, 64, 64),
        ("timm.models.convit.GPSA", "timm.models.convit.MHSA"),
        (4, 4, 4),
    ),
    # inner rows are patches, nine per image; outer rows are images
    "tnt": Representative(
        "tnt_s_patch16_224",
        {"img_size": 48, "embed_dim": 48, "inner_dim": 16, "num_heads_inner": 2, "num_heads_outer": 6, "depth": 2},
        (3, 48, 48),
        ("timm.models.tnt.Attention",),
        (2, 6, 2, 6),
    ),
    "tnt_legacy": Representative(
        "tnt_s_legacy_patch16_224",
        {"img_size": 48, "embed_dim": 48, "inner_dim": 16, "num_heads_inner": 2, "num_heads_outer": 6, "depth": 2},
        (3, 48, 48),
        ("timm.models.tnt.Attention",),
        (2, 6, 2, 6),
    ),
    # pooled queries, keys and values, pooled queries added; one head in the first stage
    "mvit": Representative(
        "mvitv2_tiny",
        {"img_size": 64},
        (3, 64, 64),
        MVIT,
        (1, 2, 4, 4, 8),
        sizes={"model_cfg": MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=24)},
    ),
    # the same with a class token
    "mvit_class_token": Representative(
        "mvitv2_small_cls",
        {"img_size": 64},
        (3, 64, 64),
        MVIT,
        (1, 2, 2, 4, 8),
        sizes={"model_cfg": MultiScaleVitCfg(depths=(1, 2, 1, 1), embed_dim=24, use_cls_token=True)},
    ),
    # subsampled keys and values
    "pvt": Representative(
        "pvt_v2_b0",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8)},
        (3, 64, 96),
        PVT,
        (1, 2, 5, 8),
    ),
    # keys and values pooled to 7x7
    "pvt_linear": Representative(
        "pvt_v2_b2_li",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64), "num_heads": (1, 2, 5, 8)},
        (3, 64, 96),
        PVT,
        (1, 2, 5, 8),
    ),
    # ---- convolutional networks with attention
    # values wider than keys
    "levit": Representative(
        "levit_128s",
        {"img_size": 96, "embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 5, 6), "depth": (1, 1, 1)},
        (3, 96, 96),
        LEVIT,
        (2, 4, 5, 6, 6),
        noise=0.15,
    ),
    # channels first
    "levit_conv": Representative(
        "levit_conv_128s",
        {"img_size": 96, "embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 5, 6), "depth": (1, 1, 1)},
        (3, 96, 96),
        LEVIT,
        (2, 4, 5, 6, 6),
        noise=0.15,
    ),
    "efficientformer": Representative(
        "efficientformer_l1",
        {"depths": (1, 1, 1, 3), "embed_dims": (16, 24, 32, 64), "num_vit": 2},
        (3, 224, 224),
        ("timm.models.efficientformer.Attention",),
        (8, 8),
    ),
    # heads mixed; the third stage ends on attention, the fourth starts on one that halves the image
    "efficientformer_v2": Representative(
        "efficientformerv2_s0",
        {
            "img_size": 128,
            "depths": (1, 1, 2, 2),
            "embed_dims": (16, 24, 32, 48),
            "num_vit": 1,
            "mlp_ratios": (2, 2, 2, 2),
        },
        (3, 128, 128),
        ("timm.models.efficientformer_v2.Attention2d", "timm.models.efficientformer_v2.Attention2dDownsample"),
        (8, 8, 8),
    ),
    # linear attention: twice the heads, as each comes at two scales
    "efficientvit_mit": Representative(
        "efficientvit_b0",
        {"widths": (8, 8, 16, 32, 64), "depths": (1, 1, 1, 1, 1), "head_dim": 8, "head_widths": (64, 64)},
        (3, 64, 96),
        LITE_MLA,
        (8, 16),
        noise=0.3,
    ),
    "efficientvit_mit_large": Representative(
        "efficientvit_l1",
        {"widths": (8, 8, 16, 32, 64), "depths": (1, 1, 1, 1, 1), "head_dim": 16, "head_widths": (64, 64)},
        (3, 64, 96),
        LITE_MLA,
        (8,),
        noise=0.15,
    ),
    # pooled keys and values; its widths are fixed
    "nextvit": Representative(
        "nextvit_small",
        {"depths": (1, 1, 5, 1), "mix_block_ratio": 0.25},
        (3, 64, 64),
        ("timm.models.nextvit.EfficientAttention",),
        (2, 4, 8),
        noise=0.06,
    ),
    # attention between channels
    "edgenext": Representative(
        "edgenext_xx_small",
        {"depths": (1, 2, 2, 2), "dims": (16, 24, 32, 48), "heads": (4, 4, 2, 6)},
        (3, 64, 96),
        ("timm.models.edgenext.CrossCovarianceAttn",),
        (4, 2, 6),
        noise=0.2,
    ),
    "visformer": Representative(
        "visformer_tiny",
        {"img_size": 64, "init_channels": 8, "embed_dim": 48, "num_heads": 4, "depth": (1, 1, 2)},
        (3, 64, 64),
        ("timm.models.visformer.Attention",),
        (4, 4, 4),
        noise=0.05,
    ),
    "caformer": Representative(
        "caformer_s18",
        {},
        (3, 64, 64),
        ("timm.models.metaformer.Attention",),
        (4, 4, 5),
        sizes={"depths": (1, 1, 2, 1), "dims": (16, 32, 128, 160)},
    ),
    # channels first, subsampled in the third stage, output projection inside the upsampling
    "lowformer": Representative(
        "lowformer_b0",
        {"width_list": (8, 8, 16, 128, 256), "depth_list": (0, 1, 1, 1, 2), "head_widths": (64, 64)},
        (3, 128, 192),
        LOWFORMER,
        (2, 4, 4),
        noise=0.15,
    ),
    # an output projection of its own, which no registered name switches on by itself
    "lowformer_projected": Representative(
        "lowformer_b0",
        {
            "width_list": (8, 8, 16, 128, 256),
            "depth_list": (0, 1, 1, 1, 2),
            "head_widths": (64, 64),
            "fused_conv": False,
        },
        (3, 128, 192),
        LOWFORMER,
        (2, 4, 4),
        noise=0.25,
    ),
    # the same, upsampled to the nearest
    "cpubone": Representative(
        "cpubone_nano",
        {"width_list": (8, 8, 16, 128, 240), "head_widths": (64, 64)},
        (3, 128, 192),
        ("timm.models.cpubone.ConvAttention",),
        (2, 4, 4),
        noise=0.15,
    ),
    "fastvit": Representative(
        "fastvit_sa12",
        {"layers": (1, 1, 1, 2), "embed_dims": (16, 32, 64, 128)},
        (3, 64, 96),
        ("timm.models.fastvit.Attention",),
        (4, 4),
        noise=0.15,
    ),
    "csatv2": Representative(
        "csatv2",
        {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)},
        (3, 128, 128),
        (ATTENTION,),
        (8, 8),
    ),
    # four rows per image, one per pixel of a patch
    "mobilevit": Representative("mobilevit_xxs", {}, (3, 96, 96), (ATTENTION,), (4,) * 9),
    # heads share one key and one value, which the first four layers downsample; its sizes are fixed
    "mobilenet_v4": Representative("mobilenetv4_hybrid_medium_075", {}, (3, 64, 96), (MULTI_QUERY,), (4,) * 8),
    "mobilenet_v5": Representative(
        "mobilenetv5_base", {"channel_multiplier": 0.125}, (3, 64, 64), (MULTI_QUERY,), (8,) * 6 + (16,) * 7
    ),
    # one query, the mean, pools the last stage
    "resnet_clip": Representative(
        "resnet50_clip",
        {"img_size": 64, "width_factor": 0.125},
        (3, 64, 64),
        ("timm.layers.attention_pool2d.AttentionPool2d",),
        (4,),
        noise=0.15,
    ),
    # rows are heads of images
    "botnet": Representative(
        "botnet26t_256",
        {"img_size": 96, "width_factor": 0.125},
        (3, 96, 96),
        ("timm.layers.bottleneck_attn.BottleneckAttn",),
        (4, 4, 4),
    ),
    # rows are heads of images, blocks see a halo
    "halonet": Representative(
        "halonet26t",
        {"width_factor": 0.125, "self_attn_kwargs": {"block_size": 4, "halo_size": 1}},
        (3, 128, 128),
        ("timm.layers.halo_attn.HaloAttn",),
        (8, 8, 8),
    ),
    # heads of queries on one linear map per position, relative positions from a convolution
    "lambda_resnet": Representative("lambda_resnet26t", {"width_factor": 0.125}, (3, 96, 96), LAMBDA, (4, 4, 4)),
    # the same, relative positions from a table
    "lambda_resnet_table": Representative(
        "lambda_resnet26rpt_256", {"img_size": 96, "width_factor": 0.125}, (3, 96, 96), LAMBDA, (4, 4, 4)
    ),
}


NEWEST = "1.0.31"
"""The timm that the table was made with; an older one may lack names and options."""

ONLY_NEWEST = {
    "gcvit": "in timm 1.0.20 and 1.0.29 its global queries meet the windows of other images, and headprobe refuses it",
    "naflex_gated": "in timm 1.0.20 gated attention is of another class",
}


def is_newest() -> bool:
    return tuple(map(int, timm.__version__.split(".")[:3])) >= tuple(map(int, NEWEST.split(".")))


def build(key: str, classes: int = 10) -> Any:
    """Return a model of the test's own."""
    with torch.inference_mode(False):
        first = _built(key, classes)
    torch.manual_seed(0)
    return copy.deepcopy(first)


@contextmanager
def _resized(representative: Representative) -> Iterator[None]:
    """Put `sizes` in the place of those that the name's function passes on."""
    module = import_module(timm.model_entrypoint(representative.name).__module__)
    made = module.build_model_with_cfg
    with pytest.MonkeyPatch.context() as patch:
        if representative.sizes is not None:
            sizes = representative.sizes
            patch.setattr(module, made.__name__, lambda *args, **given: made(*args, **{**given, **sizes}))
        yield


@cache
def _built(key: str, classes: int) -> Any:
    """Build a model that is never run: to draw its weights takes longer than to copy them."""
    representative = REPRESENTATIVES[key]
    if not timm.is_model(representative.name):
        pytest.skip(f"timm {timm.__version__} has no {representative.name}")
    if key in ONLY_NEWEST and not is_newest():
        pytest.skip(ONLY_NEWEST[key])
    torch.manual_seed(0)
    try:
        with _resized(representative):
            model = timm.create_model(representative.name, num_classes=classes, **representative.options)
    except TypeError as error:
        if is_newest():
            raise
        pytest.skip(f"timm {timm.__version__} does not know an option: {error}")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    perturbed(model)
    with torch.no_grad():
        for start, parameter in zip(before, model.parameters(), strict=True):
            parameter.copy_(torch.lerp(start, parameter, representative.noise / 0.1))
    return model.eval()
