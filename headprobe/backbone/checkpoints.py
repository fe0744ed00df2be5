"""Checkpoints of training programs: finds the weights in them, without running any code that they hold."""

import argparse
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from headprobe.errors import UsageError
from headprobe.text import counted, first_line

EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
"""Keys of a moving average of the weights, timm's own first."""

RAW = ("state_dict", "model", "model_state_dict", "module", "net", "network", "weights", "params")
"""Keys of the weights themselves, timm's own first."""

WRAPPERS = (
    "module", "_orig_mod", "model", "timm_model", "net", "network", "backbone", "encoder", "student", "teacher", "vit",
    "_forward_module", "base_model",
)  # fmt: skip
"""First parts of names that come from a wrapper: DataParallel, torch.compile, Lightning modules, transformers, ..."""

INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that a wrapper of a sub-module puts into the middle."""

NAMED = 3

LONGEST_HEADER = 100_000_000
"""Bytes that a safetensors header may have."""


class Placeholder:
    """Stands for any object of a class that is not allowed in a checkpoint; nothing of that class runs."""

    def __init__(self, *given: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass
class Found:
    """The weights of a checkpoint.

    Attributes:
        tensors: Under the names of the model, on the CPU, each with memory of its own.
        lines: What was chosen, removed and left out, in words.
        arguments: The arguments of the training program, if the checkpoint holds them.
    """

    tensors: dict[str, Tensor]
    lines: list[str] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: Path) -> tuple[Any, list[str]]:
    """Read a checkpoint of PyTorch's or a safetensors file.

    Only tensors and plain containers are built (`weights_only`). Objects of other classes are replaced by placeholders.

    Returns:
        What it holds, and the names of the classes that were replaced.

    Raises:
        UsageError: There is no such file, or it is neither.
    """
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.is_file())
        if "config.json" in inside and any(name.endswith(".safetensors") for name in inside):
            raise UsageError(
                f"a checkpoint must be one file; the model in the folder {str(path)!r} needs no conversion: "
                f"--model.name local-dir:{path}"
            )
        raise UsageError(
            f"a checkpoint must be one file; the folder {str(path)!r} has {', '.join(inside[:5]) or 'no file'}"
        )
    if not path.is_file():
        raise UsageError(f"the checkpoint {str(path)!r} does not exist")
    if path.suffix == ".safetensors":
        try:
            return load_file(path), []
        except (SafetensorError, OSError) as error:
            if cut_short(path):
                raise UsageError(f"{str(path)!r} is incomplete: copy or download it again") from error
            raise UsageError(f"{str(path)!r} is not readable as safetensors ({first_line(error)})") from error
    replaced = _foreign_classes(path)
    stands = [(type(name.rpartition(".")[2], (Placeholder,), {}), name) for name in replaced]
    try:
        # about protocols of pickle and TorchScript: what cannot be read is refused below
        with torch.serialization.safe_globals([argparse.Namespace, *stands]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True), replaced
    except (
        UnpicklingError,
        RuntimeError,
        ValueError,
        LookupError,
        EOFError,
        OSError,
        AttributeError,
        TypeError,
    ) as error:
        if "TorchScript" in str(error):
            raise UsageError(
                f"{str(path)!r} is a TorchScript archive, which holds a program beside its weights; in the program "
                "that wrote it save only the weights: torch.save(model.state_dict(), FILE)"
            ) from error
        raise UsageError(
            f"{str(path)!r} is not a checkpoint that can be read without running code ({_reason(error)}); in the "
            "program that wrote it save only the weights: torch.save(model.state_dict(), FILE)"
        ) from error


def cut_short(path: Path) -> bool:
    """Return whether a file begins as safetensors does and ends too early, as after a download that broke off.

    It begins with the length of its header, 8 bytes, and a header in JSON with the place of each tensor behind it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length, begin = int.from_bytes(file.read(8), "little"), file.read(1)
            if size < 8 or begin not in (b"{", b"") or length > LONGEST_HEADER:
                return size == 0
            if size < 8 + length:
                return True
            entries = json.loads(begin + file.read(length - 1))
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    return bool(ends) and size < 8 + length + max(ends)


def find_weights(checkpoint: Any, *, ema: bool = True, key: str | None = None, prefix: str | None = None) -> Found:
    """Find a model's weights in what a checkpoint holds.

    Args:
        checkpoint: As `read_checkpoint` returns it.
        ema: Take the moving average of the weights where there is one.
        key: Where the weights are, as in `teacher` or `ema.module`; found by itself if None.
        prefix: Take only tensors whose names begin so, and remove it; that of usual wrappers if None.

    Raises:
        UsageError: There are no weights, or it is unclear which.
    """
    if isinstance(checkpoint, Placeholder):
        raise UsageError(
            f"the checkpoint holds a whole model or other object ({type(checkpoint).__name__}), not its weights; in a "
            "program that has its classes save torch.save(model.state_dict(), FILE)"
        )
    if not isinstance(checkpoint, Mapping):
        raise UsageError(f"the checkpoint must hold a dictionary of weights, got {type(checkpoint).__name__}")
    where, state = _chosen(checkpoint, ema, key)
    lines = [_which(where, checkpoint)] if where else []
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    others = [str(name) for name in state if str(name) not in tensors]
    tensors, notes = _unwrapped(tensors, prefix)
    lines += notes
    if others:
        lines.append(f"left out: {_some(others)} (no tensors)")
    odd = [name for name, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_quantized]
    if odd:
        raise UsageError(f"sparse and quantised tensors cannot be converted; the weights hold {_some(odd)}")
    whole = whole_numbers(tensors)
    if whole:
        raise UsageError(
            "weights of whole numbers, perhaps quantised, cannot be converted; give those before they were quantised, "
            f"got {_some(whole)} as {str(tensors[whole[0]].dtype).removeprefix('torch.')}"
        )
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    lines.append("types: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items()))
    # A tensor may share memory with another, which safetensors refuses, or be a view into a larger one.
    own = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return Found(own, lines, _arguments(checkpoint))


def whole_numbers(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of weights and biases that are no floating point; counters and indices are none of them."""
    learnt = (".weight", ".bias", "cls_token", "pos_embed")
    return [name for name, tensor in tensors.items() if name.endswith(learnt) and not tensor.is_floating_point()]


def wrapper_of(names: Mapping[str, Any]) -> str:
    """Return the prefix that wrappers put before the names of weights, as in `module.`; empty if there is none.

    A prefix that more than half of the names have counts: a Lightning module holds its loss and its metrics too.
    """
    rest = list(names)
    removed = ""
    while rest:
        first, number = Counter(name.partition(".")[0] for name in rest).most_common(1)[0]
        if first not in WRAPPERS or 2 * number <= len(rest):
            break
        rest = [name.partition(".")[2] for name in rest if name.startswith(f"{first}.")]
        removed += f"{first}."
    return removed


def inside_of(names: Mapping[str, Any]) -> str:
    """Return the first part that a wrapper of a sub-module put into a name; empty if there is none."""
    found = [part for part in INSIDE if any(f".{part}." in f".{name}" for name in names)]
    return f"{found[0]}." if found else ""


def _unwrapped(tensors: dict[str, Tensor], prefix: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors without the prefix of wrappers, and what was removed and left out."""
    lines = []
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        plain[".".join(part for part in parts if part not in INSIDE)] = tensor
    if list(plain) != list(tensors):
        lines.append(
            f"removed from names: {', '.join(part for part in INSIDE if any(part in name for name in tensors))}"
        )
    if prefix is None:
        prefix = wrapper_of(plain)
    kept = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    if not kept:
        firsts = Counter(name.partition(".")[0] for name in plain).most_common(6)
        begin = ", ".join(f"{first}. ({number})" for first, number in firsts) or "nothing: there are none"
        raise UsageError(f"no tensor's name begins with {prefix!r}; they begin with {begin}")
    if prefix:
        lines.append(f"prefix: removed {prefix!r} from {counted(len(kept), 'name')}")
    left = [name for name in plain if not name.startswith(prefix)]
    if left:
        lines.append(f"left out: {_some(left)} (without the prefix {prefix!r})")
    return kept, lines


def _chosen(checkpoint: Mapping[Any, Any], ema: bool, key: str | None) -> tuple[str, Mapping[Any, Any]]:
    """Return where the weights are, empty for the top, and the dictionary that holds them."""
    if key is not None:
        return key, _at(checkpoint, key)
    averaged = [name for name in EMA if _weights_under(checkpoint.get(name))]
    raw = [name for name in RAW if _weights_under(checkpoint.get(name))]
    others = [
        str(name)
        for name, value in checkpoint.items()
        if name not in (*EMA, *RAW) and _weights_under(value) and not _bookkeeping(str(name))
    ]
    if averaged and ema:
        found = averaged[:1]
    elif raw or averaged:
        found = raw
        if not raw:
            raise UsageError(
                f"the checkpoint holds only a moving average of the weights ({averaged[0]}); leave --no-ema out"
            )
    elif _has_tensors(checkpoint):
        return "", checkpoint
    else:
        found = others
    if len(found) != 1:
        several = f"several sets of weights ({', '.join(found)}); choose one with --key" if found else ""
        deeper = _deeper(checkpoint)
        there = f"; tensors lie deeper: --key {deeper}" if deeper else ""
        nothing = f"no weights; its entries are {_some([str(name) for name in checkpoint]) or 'none'}{there}"
        raise UsageError(f"the checkpoint holds {several or nothing}")
    inner, state = _chosen(checkpoint[found[0]], ema, None)
    return ".".join(part for part in (found[0], inner) if part), state


def _deeper(checkpoint: Mapping[Any, Any], depth: int = 4) -> str | None:
    """Return the key of the first dictionary of tensors inside of others, such as `a.b.c`, None if there is none."""
    for name, value in checkpoint.items():
        if depth and isinstance(value, Mapping) and not _bookkeeping(str(name)):
            inner = "" if _has_tensors(value) else _deeper(value, depth - 1)
            if inner is not None:
                return f"{name}.{inner}".removesuffix(".")
    return None


def _at(checkpoint: Mapping[Any, Any], key: str) -> Mapping[Any, Any]:
    value: Any = checkpoint
    for part in [key] if key in checkpoint else key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not _has_tensors(value):
        raise UsageError(
            f"--key must name a dictionary of tensors; the top has {_some([str(k) for k in checkpoint])}, got {key}"
        )
    return value


def _which(where: str, checkpoint: Mapping[Any, Any]) -> str:
    first = where.partition(".")[0]
    raw = [name for name in RAW if name in checkpoint]
    if first in EMA and raw:
        return f"weights: {where}, the moving average that training validates; --no-ema takes {raw[0]}"
    if first in EMA:
        return f"weights: {where}, a moving average; there are no others"
    averaged = [name for name in EMA if _weights_under(checkpoint.get(name))]
    return f"weights: {where}" + (f", not their moving average {averaged[0]}" if averaged else "")


def _weights_under(value: Any) -> bool:
    """Return whether a value is a dictionary of tensors, or has one inside under a known key."""
    if not isinstance(value, Mapping):
        return False
    return _has_tensors(value) or any(_weights_under(value.get(name)) for name in (*EMA, *RAW))


def _has_tensors(value: Mapping[Any, Any]) -> bool:
    """Return whether most entries are tensors under names with a dot or many: a state dict, not an epoch and a loss."""
    names = [name for name, entry in value.items() if isinstance(name, str) and isinstance(entry, Tensor)]
    return bool(names) and any("." in name for name in names)


def _bookkeeping(name: str) -> bool:
    return any(word in name.lower() for word in ("optim", "sched", "scaler", "loss", "callback", "loop", "rng"))


def _foreign_classes(path: Path) -> list[str]:
    """Return the classes and functions in a checkpoint that are not allowed; none for an old format."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, UnpicklingError, OSError, LookupError, EOFError):
        return []
    return sorted(name for name in names if name != "argparse.Namespace")


def _arguments(checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    given = checkpoint.get("args")
    if isinstance(given, argparse.Namespace):
        return vars(given)
    return dict(given) if isinstance(given, dict) else {}


def _some(names: list[str]) -> str:
    others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + others


def _reason(error: Exception) -> str:
    """Return why a file was refused: PyTorch's own advice before the reason is to switch its safety off."""
    text = str(error).partition("WeightsUnpickler error:")[2].strip()
    return text.partition("\n")[0].rstrip(".") or first_line(error)
