"""Which modules of a model are attention with heads, and which models are refused, with the reason."""

import torch
from torch import nn

from headprobe.backbone.heads.reasons import WHOLE_ATTENTION, attends_by_its_names, why_a_graph, why_hidden, why_unlike
from headprobe.backbone.heads.sites import Site, known_site, one_head_by_design, site_of
from headprobe.backbone.heads.trace import Trace, point_of
from headprobe.errors import UsageError


def attention_sites(backbone: nn.Module, model: str) -> dict[str, Site]:
    """Return the sites of all attention modules by their names.

    A module without an entry of its own in the table is left out where it contains modules that have one.

    Raises:
        UsageError: The model ignores hooks.
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
    return sites


def refuse_unreachable(backbone: nn.Module, model: str) -> None:
    """Raise a UsageError for a model that ignores hooks: compiled already, TorchScript, or a graph without modules."""
    if any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in backbone.modules()
    ):
        raise UsageError(
            f"model {model!r} is compiled, so hooks would be ignored; pass the plain model and compile it afterwards"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in backbone.modules()):
        raise UsageError(
            f"model {model!r} is a TorchScript module or holds one, so its heads cannot be reached; "
            "pass the Python model"
        )
    if isinstance(backbone, torch.fx.GraphModule) and not any(site_of(module) for module in backbone.modules()):
        raise UsageError(why_a_graph(backbone, model))


def refuse_unusable(backbone: nn.Module, model: str) -> None:
    """Raise a UsageError for a model on which nothing can be proven: its weights are on the meta device.

    A model that is split over several GPUs in each call is refused too: its copies run beside each other.
    """
    names = [*backbone.named_parameters(), *backbone.named_buffers()]
    without = [name for name, tensor in names if tensor.is_meta]
    if without:
        raise UsageError(
            f"model {model!r} is on the meta device and has no numbers, so nothing can be proven on it; load its "
            f"weights onto a real device first, got {without[0]!r} on meta"
        )
    if isinstance(backbone, nn.DataParallel) and len(backbone.device_ids) > 1:
        raise UsageError(
            f"model {model!r} runs on several devices at once, where its heads cannot be told apart; pass the model "
            f"inside: model.module, got a DataParallel on {len(backbone.device_ids)} devices"
        )


def refuse_gradients(needed: bool, model: str) -> None:
    """Raise a UsageError for a model whose forward pass needs gradients: a test runs without."""
    if needed:
        raise UsageError(
            f"the forward pass of model {model!r} needs gradients, and a test runs without; mask it with "
            "headprobe.ablate, or take register_hook, retain_grad and autograd.grad out of its forward pass"
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
    if whole:
        raise UsageError(why_hidden(backbone, whole[0], model))
    # heads among the rows, or weights that are no softmax
    suspects = [*trace.stray_headless, *trace.stray_products]
    named = [name for name in suspects if attends_by_its_names(backbone.get_submodule(name))]
    for name in [*trace.stray_attention, *trace.late_attention, *named]:
        if one_head_by_design(backbone.get_submodule(name)) is None:
            raise UsageError(why_unlike(backbone, name, model))

    unused = [name for name in sites if name not in trace.shapes]
    if unused:
        name = unused[0]
        raise UsageError(
            f"model {model!r} never reaches the heads of {name!r}: they cannot be masked, because its forward pass "
            f"does not call {point_of(backbone.get_submodule(name), name, sites[name])!r}; call it, or drop the layer"
        )

    points: dict[int, str] = {}  # the first layer at each point, by the module's id
    for name, site in sites.items():
        point = backbone.get_submodule(point_of(backbone.get_submodule(name), name, site))
        other = points.setdefault(id(point), name)
        if other != name:
            raise UsageError(
                f"model {model!r}: {other!r} and {name!r} share one output projection: their heads cannot be told "
                "apart there"
            )
