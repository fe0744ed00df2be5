"""Each single head masked with ViT-Prisma (0.1.4 or later): timm's weights converted, hooks on `hook_z`."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor
from vit_prisma.configs.HookedViTConfig import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    HookedViTConfig,
)
from vit_prisma.models.base_vit import HookedViT  # type: ignore[import-not-found,import-untyped,unused-ignore]

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

HOMES = ("vit_prisma.models.weight_conversion", "vit_prisma.prisma_tools.loading_from_pretrained")
"""Where `convert_timm_weights` is: in the repository, and in release 0.1.4."""


def converted(model: Any, setting: Setting) -> Any:
    """Return the same weights in ViT-Prisma's model."""
    block = model.blocks[0]
    config = HookedViTConfig(
        n_layers=len(model.blocks),
        d_model=model.embed_dim,
        d_head=model.embed_dim // block.attn.num_heads,
        d_mlp=block.mlp.fc1.out_features,
        n_heads=block.attn.num_heads,
        patch_size=model.patch_embed.patch_size[0],
        image_size=setting.config["input_size"][-1],
        n_classes=setting.classes,
        return_type="class_logits",
        eps=block.norm1.eps,
    )
    other = HookedViT(config)
    conversion = import_module(next(home for home in HOMES if find_spec(home)))
    other.load_state_dict(conversion.convert_timm_weights(model.state_dict(), config))
    return other.eval()


def prepared(setting: Setting) -> Callable[[], Scores]:
    """Return the loop: images decoded once, then one hooked pass over them for each mask."""
    model = build(setting)
    hooked = converted(model, setting)
    warm(hooked, setting)

    def loop() -> Scores:
        data = batches(*decoded(setting), setting.batch)
        scores = {BASELINE: total(scored(hooked(images), labels) for images, labels in data)}
        for layer, head in single_heads(model):

            def zero(values: Tensor, hook: Any, head: int = head) -> Tensor:  # noqa: ARG001  # called by keyword
                values[:, :, head] = 0
                return values

            hooks = [(f"blocks.{layer}.attn.hook_z", zero)]
            scores[named(layer, head)] = total(
                scored(hooked.run_with_hooks(images, fwd_hooks=hooks), labels) for images, labels in data
            )
        return scores

    return loop


if __name__ == "__main__":
    main(prepared)
