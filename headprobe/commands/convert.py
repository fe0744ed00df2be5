"""`convert`: turns a checkpoint of a training program into safetensors with the names of timm's model."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headprobe.commands.parser import Parser
from headprobe.errors import UsageError
from headprobe.text import counted


def run(words: list[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        UsageError: The checkpoint cannot be read, it is unclear where its weights are, or the new file exists.
        RunError: The new file cannot be written.
    """
    parser = Parser(
        prog="headprobe convert", description="Convert a checkpoint to safetensors, without running any code in it."
    )
    parser.add_argument("checkpoint", type=str, help="A file of torch.save, or safetensors with other names.")
    parser.add_argument("output", type=str, help="The new .safetensors file; an existing one is never replaced.")
    parser.add_argument(
        "--no-ema", action="store_true", help="Not the moving average of the weights, where there is one."
    )
    parser.add_argument("--key", type=str | None, default=None, help="Entry with the weights, such as teacher.")
    parser.add_argument("--prefix", type=str | None, default=None, help="Take only names that begin so, without it.")
    options = parser.parse_args(words)
    convert(Path(options.checkpoint), Path(options.output), not options.no_ema, options.key, options.prefix)


def convert(source: Path, output: Path, ema: bool, key: str | None, prefix: str | None) -> None:
    """Convert one checkpoint and print what was done.

    Args:
        source: The checkpoint.
        output: The new file.
        ema: Take the moving average of the weights where there is one.
        key: Where the weights are, None to find them.
        prefix: What to remove from the names, None to find it.
    """
    if output.suffix != ".safetensors":
        raise UsageError(f"the new file must be called NAME.safetensors, got {str(output)!r}")
    if output.exists():
        raise UsageError(f"the new file must not exist yet; remove it or choose another name, got {str(output)!r}")
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {str(output.parent)!r} for the new file")

    from safetensors.torch import save

    from headprobe.backbone.checkpoints import find_weights, read_checkpoint
    from headprobe.backbone.weights import classes_in
    from headprobe.files import write_bytes

    checkpoint, replaced = read_checkpoint(source)
    found = find_weights(checkpoint, ema=ema, key=key, prefix=prefix)
    recipe = recipe_of(found.arguments, classes_in(found.tensors, "head"))
    metadata = {"format": "pt"} | ({"headprobe": json.dumps(recipe, sort_keys=True)} if recipe else {})
    write_bytes(output, save(found.tensors, metadata))
    lines = list(found.lines)
    if replaced:
        lines.append(
            f"not read: objects of {', '.join(replaced[:3])}{', ...' if replaced[3:] else ''} (no code was run)"
        )
    lines.append(f"wrote {output}: {counted(len(found.tensors), 'tensor')}, {output.stat().st_size / 2**20:.1f} MiB")
    name = "NAME"
    if recipe:
        name = recipe["name"]
        given = json.dumps(recipe["options"]) if recipe["options"] else "none"
        lines.append(f"kept in it: trained as {name}, with the options {given}")
    lines.append(
        f"score it: headprobe test --model.name {name} --model.weights {shlex.quote(str(output))} --data.path ..."
    )
    sys.stdout.writelines(f"{line}\n" for line in lines)


def recipe_of(arguments: Mapping[str, Any], classes: int | None) -> dict[str, Any] | None:
    """Return what a model is built with again, from the arguments of timm's train.py; None if they are not those.

    Args:
        arguments: By name, as argparse holds them.
        classes: Classes of the weights.
    """
    import timm

    name = arguments.get("model")
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    config = timm.get_pretrained_cfg(name)
    options = dict(arguments.get("model_kwargs") or {})
    for option, argument in (("in_chans", "in_chans"), ("global_pool", "gp")):
        if arguments.get(argument) is not None:
            options[option] = arguments[argument]

    overlay = {
        key: arguments[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode") if arguments.get(key)
    }
    channels = options.get("in_chans") or (config.input_size[0] if config is not None else 3)
    size = arguments.get("input_size") or arguments.get("img_size")
    if size:
        overlay["input_size"] = [channels, size, size] if isinstance(size, int) else list(size)
    if size and config is not None and config.fixed_input_size:
        options.setdefault("img_size", overlay["input_size"][1:])
    if overlay:
        options["pretrained_cfg_overlay"] = overlay
    return {"name": name, "num_classes": classes, "options": options}
