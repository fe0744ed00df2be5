"""Why a model is refused, in words: what was seen of its attention, and what it lacks to be masked."""

import re
from collections.abc import Iterable

import torch
from torch import nn

from headprobe.backbone.gradients import about_gradients
from headprobe.backbone.heads.sites import class_path, one_head_by_design
from headprobe.backbone.heads.trace import Trace
from headprobe.text import first_line

SIZE_FAILURES = (RuntimeError, AssertionError, ValueError, IndexError)
"""What torch and timm raise for images of another size."""

FAILURES = (*SIZE_FAILURES, TypeError, AttributeError, KeyError, ArithmeticError)
"""What a forward pass on noise may raise."""

WHOLE_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules of torch that do all of attention in one call, so that no hook reaches their heads."""

HEADS = ("heads", "n_heads", "n_head", "nhead", "nheads", "num_attention_heads", "heads_num", "head_num", "h")
"""Names that other code gives the number of heads."""

PROJECTIONS = (
    *("to_out", "out_proj", "proj_out", "o_proj", "c_proj", "out", "wo", "w_o", "out_linear", "linear_out"),
    *("output", "dense", "fc_out", "fc", "projection", "last_linear"),
)
"""Names that other code gives the output projection."""

OWN_CLASS = "docs/heads.md, 'An attention class of your own', shows how"


def why_it_fails(
    backbone: nn.Module, input_size: tuple[int, int, int], model: str, without: str, failed: Exception
) -> str:
    """Return the message for a model that fails on noise.

    Args:
        backbone: The model.
        input_size: `(channels, height, width)` of the noise.
        model: Its name.
        without: What the error without gradients said.
        failed: The error with gradients.
    """
    size, said = " x ".join(map(str, input_size)), first_line(failed)
    weights = list(backbone.parameters())
    devices = sorted({str(weight.device) for weight in weights})
    if about_gradients(without):
        return (
            f"the forward pass of model {model!r} needs gradients ({without}) and fails with them too, on "
            f"images of {size} ({said}); try it on such images yourself, or give the size of yours: input_size"
        )
    if len(devices) > 1:
        return (
            f"model {model!r} has weights on several devices and does not run ({said}); move it to one, got {devices}"
        )
    if "not implemented for" in said and any(weight.dtype.itemsize < 4 for weight in weights):
        return f"model {model!r} does not run in {weights[0].dtype} on {devices[0]} ({said}); use float32 there"
    if isinstance(failed, NotImplementedError) or not isinstance(failed, SIZE_FAILURES):
        return (
            f"model {model!r} does not run on one tensor of images of {size} ({type(failed).__name__}: {said}); wrap "
            "it so that model(images) returns its logits"
        )
    return (
        f"model {model!r} does not take images of {size} ({said}); give the size it was built for: input_size in "
        "Python, model.options.img_size or model.options.pretrained_cfg_overlay.input_size on the command line"
    )


def why_no_heads(backbone: nn.Module, trace: Trace, model: str) -> str:
    """Return the message for a model without any module that is built as headprobe masks attention.

    Args:
        backbone: The model.
        trace: What it did in a forward pass.
        model: Its name.
    """
    named = dict(backbone.named_modules())
    hidden = [name for name in trace.ran if isinstance(named[name], WHOLE_ATTENTION)]
    if hidden:
        return why_hidden(backbone, hidden[0], model)
    single = [(name, module, what) for name, module in named.items() if (what := one_head_by_design(module))]
    if single:
        name, module, what = single[0]
        return (
            f"model {model!r} has attention with a single head by design ({what}: {name!r}, {class_path(module)}): "
            "there are no heads to tell apart"
        )
    suspects = [*trace.stray_headless, *trace.stray_products]
    attending = [name for name in suspects if attends_by_its_names(named[_holder(named, name)])]
    # the last resort is what names say: not every way to attend can be watched
    named_so = [name for name in trace.ran if attends_by_its_names(named[name]) and _found(named[name], PROJECTIONS)]
    for name in [*trace.stray_attention, *attending, *named_so]:
        return why_unlike(backbone, name, model)
    seen = ""
    if trace.stray_headless:
        name = trace.stray_headless[0]
        seen = f" (what attends in {name or 'its own forward'!r}, {class_path(named[name])}, has no axis of heads)"
    return (
        f"model {model!r} has no attention heads{seen}; "
        "choose a transformer such as vit_base_patch16_224 or swin_tiny_patch4_window7_224"
    )


def why_hidden(backbone: nn.Module, name: str, model: str) -> str:
    """Return the message for a module of torch that does all of attention in one call."""
    return (
        f"model {model!r} computes attention in {name or 'its own forward'!r} "
        f"({class_path(backbone.get_submodule(name))}), which hides its heads in one call: headprobe cannot mask them; "
        f"put a module with num_heads and proj in its place ({OWN_CLASS}), or use timm's model of that architecture"
    )


def why_unlike(backbone: nn.Module, name: str, model: str) -> str:
    """Return the message for a module that attends and is not built as headprobe masks it: what it needs, and has."""
    named = dict(backbone.named_modules())
    graph = named[name]
    if isinstance(graph, torch.fx.GraphModule):
        return why_a_graph(graph, model)
    holder = _holder(named, name)
    module = named[holder]
    needs, has = [], []
    heads = getattr(module, "num_heads", None)
    if not isinstance(heads, int) or heads < 1:
        needs.append("an attribute num_heads" if heads is None else f"a whole number num_heads (it is {heads!r})")
        has += [f"{other} = {getattr(module, other)}" for other in _found(module, HEADS)]
    if not isinstance(getattr(module, "proj", None), nn.Module):
        needs.append("a sub-module proj that takes the concatenated heads")
        has += _found(module, PROJECTIONS)
    if not needs:
        return (
            f"model {model!r} computes attention in {holder or 'its own forward'!r} ({class_path(module)}) in a way "
            "that headprobe cannot mask: not in heads that a sub-module `proj` takes on"
        )
    seen = f"; it has {' and '.join(has)}" if has else ""
    return (
        f"model {model!r} computes attention in {holder or 'its own forward'!r} ({class_path(module)}), which is not "
        f"built as headprobe masks it: it needs {' and '.join(needs)}{seen}; headprobe cannot mask it otherwise "
        f"({OWN_CLASS})"
    )


def why_a_graph(graph: torch.fx.GraphModule, model: str) -> str:
    """Return the message for a graph of operations."""
    attends = [node.name for node in graph.graph.nodes if re.search("softmax|product_attention", str(node.target))]
    seen = f" and computes attention in its node {attends[0]!r}" if attends else ""
    return (
        f"model {model!r} is a graph of operations (torch.fx){seen}: attention is no longer a module there, and "
        "headprobe cannot mask it; pass the model that the graph was made from"
    )


def attends_by_its_names(module: nn.Module) -> bool:
    """Return whether a module names a number of heads above 1, so that products in it are attention with heads."""
    return any(isinstance(n := getattr(module, name, None), int) and n > 1 for name in ("num_heads", *HEADS))


def _holder(named: dict[str, nn.Module], name: str) -> str:
    """Return the module that a user would call the attention: around a helper without any name for its heads."""
    around = name
    for _ in range(3):
        if around in named and attends_by_its_names(named[around]):
            return around
        around = around.rpartition(".")[0]
    return name


def _found(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the first of these names under which a module has a number of heads, or a sub-module, in a list."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, nn.Module) or (isinstance(value, int) and value > 0):
            return [name]
    return []
