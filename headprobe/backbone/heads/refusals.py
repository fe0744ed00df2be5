"""Which modules of a model are attention with heads, and which models are refused, with the reason."""

from typing import Any

import torch
from torch import Tensor, nn

from headprobe.backbone.heads.sites import Site, class_path, known_site, one_head_by_design, site_of
from headprobe.backbone.heads.trace import Trace, point_of
from headprobe.backbone.sandbox import is_out_of_memory
from headprobe.errors import UsageError
from headprobe.text import first_line

WHOLE_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules of torch that do all of attention in one call, so that no hook reaches their heads."""


def try_output(backbone: nn.Module, images: Tensor, model: str) -> Any:
    """Return the model's output on noise.

    Raises:
        UsageError: The model does not take images of this size.
    """
    try:
        return backbone(images)
    except UsageError:
        raise
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:  # what torch and timm raise for a size
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        size = " x ".join(map(str, images.shape[1:]))
        raise UsageError(
            f"model {model!r} does not take images of {size} ({first_line(error)}); give the size it "
            "was built for: input_size in Python, model.options.img_size or "
            "model.options.pretrained_cfg_overlay.input_size on the command line"
        ) from error


def attention_sites(backbone: nn.Module, model: str) -> dict[str, Site]:
    """Return the sites of all attention modules by their names.

    A module without an entry of its own in the table is left out where it contains modules that have one.

    Raises:
        UsageError: There is none.
    """
    refuse_unreachable(backbone, model)
    named = dict(backbone.named_modules())
    known = [name for name, module in named.items() if known_site(module) is not None]
    sites: dict[str, Site] = {}
    for name, module in named.items():
        site = site_of(module)
        around = name not in known and any(inner.startswith(f"{name}." if name else "") for inner in known)
        if site is not None and not around:
            sites[name] = site
    if not sites:
        raise UsageError(_why_no_heads(named, model))
    return sites


def refuse_unreachable(backbone: nn.Module, model: str) -> None:
    """Raise a UsageError for a model that ignores hooks: compiled already, or TorchScript."""
    if hasattr(backbone, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in backbone.modules()
    ):
        raise UsageError(
            f"model {model!r} is compiled, so hooks would be ignored; pass the plain model and compile it afterwards"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in backbone.modules()):
        raise UsageError(
            f"model {model!r} is a TorchScript module or holds one, so its heads cannot be reached; "
            "pass the Python model"
        )


def _why_no_heads(named: dict[str, nn.Module], model: str) -> str:
    """Return the message for a model without attention heads."""
    hidden = [(name, module) for name, module in named.items() if isinstance(module, WHOLE_ATTENTION)]
    if hidden:
        where, whole = hidden[0]
        return (
            f"model {model!r} computes attention in {where!r} ({class_path(whole)}), which hides its heads in one "
            "call: they cannot be masked"
        )
    single = [(name, module, what) for name, module in named.items() if (what := one_head_by_design(module))]
    if single:
        name, module, what = single[0]
        return (
            f"model {model!r} has attention with a single head by design ({what}: {name!r}, {class_path(module)}): "
            "there are no heads to tell apart"
        )
    return (
        f"model {model!r} has no attention heads; "
        "choose a transformer such as vit_base_patch16_224 or swin_tiny_patch4_window7_224"
    )


def refuse_surprises(backbone: nn.Module, sites: dict[str, Site], trace: Trace, model: str) -> None:
    """Refuse a model that does not use each layer once in a forward pass, or attends somewhere else.

    Raises:
        UsageError: The model is refused; the message says why.
    """
    repeated = [name for name, times in trace.entered.items() if times > 1]
    if repeated:
        raise UsageError(
            f"model {model!r} runs {repeated[0]!r} more than once per image: its heads cannot be told apart"
        )

    whole = [name for name in trace.ran if isinstance(backbone.get_submodule(name), WHOLE_ATTENTION)]
    for name in [*trace.stray_attention, *trace.late_attention, *whole]:
        module = backbone.get_submodule(name)
        if one_head_by_design(module) is None:
            raise UsageError(
                f"model {model!r} computes attention in {name or 'its own forward'!r} ({class_path(module)}) "
                "in a way that headprobe cannot mask: not in heads that a sub-module `proj` takes on"
            )

    unused = [name for name in sites if name not in trace.shapes]
    if unused:
        raise UsageError(f"model {model!r} never reaches the heads of {unused[0]!r}: they cannot be masked")

    points: dict[int, str] = {}  # the first layer at each point, by the module's id
    for name, site in sites.items():
        point = backbone.get_submodule(point_of(backbone.get_submodule(name), name, site))
        other = points.setdefault(id(point), name)
        if other != name:
            raise UsageError(
                f"model {model!r}: {other!r} and {name!r} share one output projection: their heads cannot be told "
                "apart there"
            )
