"""The model card of a pruned model: what it is, where it comes from, how it is loaded. From its `config.json` alone."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from headprobe.errors import UsageError
from headprobe.text import counted, ranges

TEMPLATE = """\
---
library_name: timm
tags: [image-classification, pruning, headprobe]
---

# {title}

{what}

{table}

Load it as a PyTorch module with timm's interface (`forward_features`, `forward_head`, `default_cfg`):

```python
import headprobe

model = headprobe.load_pruned("FOLDER")
```

Measure it like any model, describe its heads, prune it again:

```bash
python -m headprobe test --model.name local-dir:FOLDER --data.path IMAGES --mask-spec each:head
```

`config.json` holds the SHA-256 of `model.safetensors` and of itself; a changed byte is refused.

## Heads that are left

| layer | heads | of | numbers in the architecture |
| --- | --- | --- | --- |
{layers}
"""


SECONDS = "seconds"
"""Stands for numbers above 0."""

SHAPES: dict[str, Any] = {
    "parent": {"name?": str, "weights_sha256?": str},
    "mask": {"spec": str, "digest": str},
    "ablation": str,
    "calibration": {"sha256": str, "images?": int},
    "proof": {"difference": float, "images": int},
    "cost": {
        "parameters": [int],
        "multiply_adds": [int],
        "latencies": [{"batch": int, "before": [SECONDS], "after": [SECONDS], "passes?": int}],
        "device": str,
    },
    "fine_tuned": {"weights_sha256": str, "mask_spec?": str},
}
"""What a configuration says of where its model comes from, where it says it: names with ? may be left out."""

NONE_TOO = ("calibration",)
"""Entries that may be null."""


def refuse_other_shapes(about: Mapping[str, Any], where: str = "about") -> None:
    """Refuse entries of other shapes than those that the card, and whoever loads the model, reads.

    Args:
        about: Where a model comes from, as JSON values.
        where: Its name, for messages.

    Raises:
        UsageError: With the entry.
    """
    for name, shape in SHAPES.items():
        if name not in about or (about[name] is None and name in NONE_TOO) or _has_shape(about[name], shape):
            continue
        names = ", ".join(one for one in shape if not one.endswith("?")) if isinstance(shape, Mapping) else ""
        what = "text" if shape is str else f"an object with {names}" if names else "an object"
        raise UsageError(
            f"{where}[{name!r}] must be {what}, as headprobe prune writes it (docs/prune.md); give other entries other "
            f"names, got {about[name]!r}"
        )
    before = about.get("parent", {}).get("pruned", {})
    if not isinstance(before, Mapping):
        raise UsageError(f"{where}['parent']['pruned'] must be an object such as {where} itself, got {before!r}")
    if before:
        refuse_other_shapes(before, f"{where}['parent']['pruned']")


def _has_shape(value: Any, shape: Any) -> bool:
    if isinstance(shape, Mapping):
        return isinstance(value, Mapping) and all(
            name.endswith("?") if (there := value.get(name.rstrip("?"))) is None else _has_shape(there, own)
            for name, own in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and bool(value) and all(_has_shape(one, shape[0]) for one in value)
    if shape is SECONDS:
        return isinstance(value, float) and value > 0
    return isinstance(value, (int, float) if shape is float else shape) and not isinstance(value, bool)


def card_text(config: Mapping[str, Any]) -> str:
    """Return the text of `README.md` for a pruned model.

    Args:
        config: Its whole `config.json`.
    """
    own = config["headprobe"]
    kept = sum(len(layer["kept"]) for layer in own["layers"].values())
    before = sum(layer["heads"] for layer in own["layers"].values())
    gone, layers_hit = counted(before - kept, "attention head"), counted(len(own["layers"]), "layer")
    what = f"`{config['architecture']}` of timm, of which {gone} were removed for good in {layers_hit}."
    again = "pruned" in own.get("parent", {})
    if "fine_tuned" not in own:
        what += f" Its logits are those of {'its parent, which was pruned before,' if again else 'the whole model'} "
        what += "under the mask."
    rows = [f"| {name} | {text} |" for name, text in _facts(own)]
    layers = [
        f"| {name} | {len(layer['kept'])} | {layer['heads']} | {ranges(layer['kept']) or 'none, a bias is left'} |"
        for name, layer in own["layers"].items()
    ]
    table = "\n".join(["| | |", "| --- | --- |", *rows])
    title = f"{config['architecture']} without {counted(before - kept, 'head')}"
    return TEMPLATE.format(title=title, what=what, table=table, layers="\n".join(layers))


def steps_of(own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what was done to a pruned model, one entry for each time it was pruned, the first one first."""
    found: list[Mapping[str, Any]] = []
    step: Mapping[str, Any] | None = own
    while step is not None:
        found.insert(0, step)
        step = step.get("parent", {}).get("pruned")
    return found


def _facts(own: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what is known of where the model comes from, in words."""
    parent = own.get("parent", {})
    found = [
        ("parent", f"{parent.get('name', 'unknown')}, weights SHA-256 `{parent.get('weights_sha256', 'unknown')}`")
    ]
    before = [step for step in steps_of(own)[:-1] if "mask" in step]
    found += [("pruned before", f"`{step['mask']['spec']}`, {step.get('ablation', 'zero')}") for step in before]
    if "mask" in own:
        found.append(("mask", f"`{own['mask']['spec']}`, SHA-256 `{own['mask']['digest']}`"))
    if "ablation" in own:
        found.append(("what stands for the heads", own["ablation"]))
    if own.get("calibration"):
        images, digest = own["calibration"].get("images", "unknown"), own["calibration"]["sha256"]
        found.append(("fitted on", f"{images} images, constants SHA-256 `{digest}`"))
    if "proof" in own:
        text = f"logits differ from the masked model's by {own['proof']['difference']:.1e} of the largest"
        found.append(("proof", f"{text} ({own['proof']['images']} images, float32)"))
    found += _costs(own["cost"]) if "cost" in own else []
    if "fine_tuned" in own:
        start = own["fine_tuned"]["weights_sha256"]
        found.append(("fine-tuned", f"from weights SHA-256 `{start}`; the logits are no longer those of the mask"))
    return found


def _costs(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a model costs beside its parent, in words."""
    found = [
        (name.replace("_", "-"), " to ".join(f"{number:,}" for number in cost[name]))
        for name in ("parameters", "multiply_adds")
    ]
    for one in cost["latencies"]:
        ratios = [before / after for before, after in zip(one["before"], one["after"], strict=False)]
        times = " to ".join(f"{1000 * median(one[which]):.2f}" for which in ("before", "after"))
        speed = f"{median(ratios):.2f} times as fast, [{min(ratios):.2f}, {max(ratios):.2f}] in {len(ratios)} pairs"
        found.append((f"a batch of {one['batch']}", f"{times} ms, {speed} ({cost['device']})"))
    return found
