"""What units and their store cost beside a plain loop: ``python -m benchmarks.units --data PATH --weights FILE``.

Both take turns, unit by unit, on the same images in one process: read, decode, run under one mask, count. Ours also
notes every row, keeps the sums by unit, adds them up in their tree and stores them.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Times, compare, markdown, publish, refuse_below_one
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.errors import RunError, UsageError
from headprobe.masks.spec import MaskSpec
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy, image_groups
from headprobe.module import HeadProbe
from headprobe.units.store import UnitStore

PLAIN, OURS = "plain loop", "units and their store"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the numbers."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        probe, data = prepare(options)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
    times = take_turns(probe, data, options.repeats)
    rows = compare(times, PLAIN)
    setting = {
        "model": options.model,
        "mask": options.mask,
        "data": Path(options.data).name,
        "images": data.expected_images,
        "units": data.units,
        "threads": options.threads,
        "repeats": options.repeats,
        "torch": torch.__version__,
    }
    publish(table(setting, rows), setting, rows, options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.units", description=__doc__)
    parser.add_argument("--data", default="digits", help="as --data.path of headprobe; by default the bundled digits")
    parser.add_argument("--model", default="digits_vit", help="as --model.name of headprobe")
    parser.add_argument("--weights", help="as --model.weights of headprobe")
    parser.add_argument("--mask", default="layer:3", help="as --mask-spec of headprobe")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each of them all images in both ways")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "threads", "repeats")
    return options


def prepare(options: argparse.Namespace) -> tuple[HeadProbe, ImageNetDataModule]:
    """Return the model under its mask, its passes planned, and the data bound to it."""
    probe = HeadProbe(options.model, options.weights).eval()
    probe.choose_masks([MaskSpec(options.mask)])
    data = ImageNetDataModule(options.data, num_workers=0)
    data.prepare_data()
    data.bind(probe.data_config, probe.num_classes)
    probe.plan_passes(data.batch_size)
    return probe, data


def take_turns(probe: HeadProbe, data: ImageNetDataModule, repeats: int) -> Times:
    """Return the times of each case and round, after one round to warm up; who begins changes with every unit."""
    times: Times = {PLAIN: [], OURS: []}
    with torch.inference_mode():
        for round_ in range(-1, repeats):
            spent = one_round(probe, data)
            for name, one in spent.items() if round_ >= 0 else ():
                times[name].append(one)
    return times


def one_round(probe: HeadProbe, data: ImageNetDataModule) -> dict[str, tuple[float, float]]:
    """Score all images in both ways and return the seconds of each, checking that both count the same."""
    directory = Path(tempfile.mkdtemp())
    metric = PairedAccuracy(len(probe.variants), probe.num_classes)
    probe.begin_units(data.units, None, data.unit_rows)
    store, sums = UnitStore(directory, data.units), probe.unit_sums
    if sums is None:
        raise SystemExit("the model has no unit sums")

    def plain(unit: int) -> None:
        data.todo = [unit]
        for batch in data.stream():
            groups = torch.tensor(image_groups(unit, batch.rows.tolist()))
            metric.update(probe.masked_logits(batch.images), batch.labels, groups)

    def ours(unit: int) -> None:
        data.todo = [unit]
        for number, batch in enumerate(data.stream()):
            probe.test_step(batch, number)
        store.save_in_time(sums.nodes)

    spent = {PLAIN: (0.0, 0.0), OURS: (0.0, 0.0)}
    cases: list[tuple[str, Callable[[int], None]]] = [(PLAIN, plain), (OURS, ours)]
    for unit in range(data.units):
        cases.reverse()
        for name, score in cases:
            began, began_cpu = time.perf_counter(), time.process_time()
            score(unit)
            clock, cpu = spent[name]
            spent[name] = clock + time.perf_counter() - began, cpu + time.process_time() - began_cpu
    whole = sums.whole()["scores"]
    shutil.rmtree(directory)
    if not torch.equal(whole.top1, metric.top1):
        raise SystemExit("both ways must count the same images right")
    return spent


def table(setting: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    names = ("clock_ratio_of_minima", "clock_median_ratio", "cpu_ratio_of_minima", "cpu_median_ratio")
    lines = [(row["case"], *(f"{row[name]:.3f}" for name in names)) for row in rows]
    return markdown(setting, ("case", "clock: minima", "median", "CPU: minima", "median"), lines)


if __name__ == "__main__":
    main()
