"""What a run was made of: enough to run it again, and to know what its numbers are of."""

import re
from collections.abc import Iterator
from typing import Any

from headprobe.report.page.answers.wording import judged_images
from headprobe.report.page.notices import TOLD, plain
from headprobe.run.load import RunFiles
from headprobe.text import counted, duration

_SEEDED = re.compile(r"random|one-per-layer|resample")


def provenance(run: RunFiles) -> list[tuple[str, str]]:
    """Return names and values, as plain text; what the run's record does not hold is left out."""
    record = run.record
    found = [*_what_ran(record), *_model(record), *_data(run), *_how(record), *_when(record)]
    there = {text for _, text in found}  # such as the transform, which would stand twice
    decided = {key: str(text) for key, text in _decisions(record).items() if str(text) not in there}
    told = [(f"decided: {key}", text) for key, text in decided.items() if key not in TOLD or plain(text) != text]
    return [(name, text) for name, text in [*found, *told] if text]


def _decisions(record: dict[str, Any]) -> dict[str, Any]:
    return record.get("decisions") or {}


def _what_ran(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    specs = [str(spec) for spec in record.get("specs") or []]
    yield "command", str(record.get("command") or "")
    yield "masks", ", ".join(specs)
    yield "ablation", str(record.get("ablation") or "")
    seeded = [spec for spec in [*specs, *str(record.get("ablation") or "").split(",")] if _SEEDED.search(spec)]
    yield "seeds (at the end of each; 0 where none is written)", ", ".join(seeded)
    yield "key of the run", str(record.get("key") or "")


def _model(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    model = record["model"]
    yield "model", str(model.get("title") or model["name"])
    yield "architecture", str(model.get("architecture") or "")
    per_layer = model.get("heads_per_layer") or []
    yield "heads", f"{counted(sum(per_layer), 'head')} in {counted(len(per_layer), 'layer')}: {_runs(per_layer)}"
    yield "weights", str(_decisions(record).get("weights") or model.get("weights") or "")
    yield "SHA-256 of the weights", str(model.get("weights_sha256") or "")
    yield "what a mask takes away", str(model.get("semantics") or "")


def _runs(counts: list[int]) -> str:
    """Return heads per layer in short: `3, 3, 6, 6` as `2 x 3, 2 x 6`."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][1] == count:
            runs[-1][0] += 1
        else:
            runs.append([1, count])
    return ", ".join(f"{times} x {count}" for times, count in runs)


def _data(run: RunFiles) -> Iterator[tuple[str, str]]:
    data = run.record["data"]
    yield "data", str(data.get("path") or "")
    yield "configuration of the data", str(data.get("name") or "")
    yield "split", str(data.get("split") or "")
    yield "revision", str(data.get("revision") or "")
    if files := data.get("files"):
        names = [str(file["name"]) if isinstance(file, dict) else str(file) for file in files]
        yield "files", f"{counted(len(names), 'file')}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    yield "images judged", f"{judged_images(run):,}"
    if fitted := run.record.get("calibration_images"):
        yield "images that calibrated", f"{int(fitted):,} ({run.calibration or 'nothing fitted'})"
    yield "images that could not be read", f"{int(run.record.get('bad_images') or 0):,}"
    yield "transform", " ".join(str(data.get("transform") or "").split())


def _how(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "precision", str(record.get("precision") or "")
    yield "device", str(record.get("device") or "")
    hardware = record.get("hardware") or {}
    gpus = ", ".join(map(str, hardware.get("gpus") or []))
    threads = f"{counted(int(hardware['threads']), 'thread')}" if hardware.get("threads") else ""
    yield "hardware", ", ".join(part for part in (str(hardware.get("machine") or ""), threads, gpus) if part)
    yield "processes", str(record.get("processes") or "")
    yield "batch size", str(record.get("batch_size") or "")
    versions = record.get("versions") or {}
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _when(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "began", str(record.get("began") or "")
    yield "ended", str(record.get("ended") or "")
    if record.get("seconds") is not None:
        yield "time of the last session", duration(float(record["seconds"]))
    if "units_resumed" in record:
        units = sum((record.get("units_by_row_budget") or {}).values())
        resumed = int(record["units_resumed"] or 0)
        yield "units finished by earlier sessions", f"{resumed:,}" + (f" of {units:,}" if units else "")
    yield "status", str(record.get("status") or "")
