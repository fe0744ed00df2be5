"""Each single head masked with TransformerLens: timm's weights in Hugging Face's ViT, bridged, hooks on `hook_z`."""

import tempfile
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    TransformerBridge,
)
from transformers import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.peers.common import (
    BASELINE,
    Scores,
    Setting,
    batches,
    build,
    decoded,
    main,
    named,
    scored,
    single_heads,
    total,
    warm,
)

SAME = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def as_hugging_face(model: Any, setting: Setting) -> Any:
    """Return the same weights in Hugging Face's ViT."""
    block = model.blocks[0]
    config = ViTConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        layer_norm_eps=block.norm1.eps,
        image_size=setting.config["input_size"][-1],
        patch_size=model.patch_embed.patch_size[0],
        num_channels=setting.config["input_size"][0],
        num_labels=setting.classes,
    )
    other = ViTForImageClassification(config).eval()
    other.load_state_dict(converted(model.state_dict(), len(model.blocks)))
    return other


def converted(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return timm's weights under Hugging Face's names."""
    new = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    for kind in ("weight", "bias"):
        new[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        new |= {f"vit.layernorm.{kind}": state[f"norm.{kind}"], f"classifier.{kind}": state[f"head.{kind}"]}
        for layer in range(layers):
            ours, theirs = f"blocks.{layer}", f"vit.layers.{layer}"
            new |= {f"{theirs}.{name}.{kind}": state[f"{ours}.{own}.{kind}"] for own, name in SAME.items()}
            parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            new |= {f"{theirs}.attention.{one}_proj.{kind}": part for one, part in zip("qkv", parts, strict=True)}
    return new


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: images decoded once, then one hooked pass over them for each mask."""
    model = build(setting)
    heads = single_heads(model)
    with tempfile.TemporaryDirectory() as folder:
        as_hugging_face(model, setting).save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, device="cpu")
    warm(bridge, setting)

    def loop() -> Scores:
        data = batches(*decoded(setting), setting.batch)
        scores = {BASELINE: total(scored(logits_of(bridge(images)), labels) for images, labels in data)}
        for layer, head in heads:

            def zero(values: Tensor, hook: Any, head: int = head) -> Tensor:  # noqa: ARG001  # called by keyword
                values[:, :, head] = 0
                return values

            hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
            scores[named(layer, head)] = total(
                scored(logits_of(bridge.run_with_hooks(images, fwd_hooks=hooks)), labels) for images, labels in data
            )
        return scores

    return loop


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model gives: them alone, or Hugging Face's record of outputs."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


if __name__ == "__main__":
    main(prepared)
