"""Sums over units: whoever computed them and however they were cut, the numbers are the same."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from headprobe.data.stream import ImageBatch
from headprobe.describe.attention import AttentionSums
from headprobe.describe.base import HeadStatistic
from headprobe.describe.similarity import SimilaritySums
from headprobe.describe.spectrum import SpectrumSums
from headprobe.errors import RunError, UsageError
from headprobe.module import HeadProbe
from headprobe.units.tree import Arrays, read_sums, write_sums
from headprobe.units.unit_sums import UnitSums
from tests.describe.driving import describe, feed, noise, prepare, tiny_probe

Make = Callable[[], HeadStatistic]

STATISTICS: list[Make] = [
    AttentionSums,
    SpectrumSums,
    SimilaritySums,
    lambda: SimilaritySums("all", "mean"),
    lambda: SimilaritySums("pairs", "mean", [(0, 1)]),
]
NAMES = ["attention", "spectrum", "similarity", "similarity of all", "similarity of pairs"]
SIZES = [5, 1, 0, 4, 6]


def sums(statistic: HeadStatistic) -> dict[str, Arrays]:
    return {name: metric.to_arrays() for name, metric in statistic.whole.items()}


def run(make: Make, kind: str, sizes: Sequence[int] = SIZES, batch: int = 3) -> HeadStatistic:
    probe, statistic = tiny_probe(kind), make()
    describe(probe, [statistic], noise(probe, sum(sizes)), ["layer:1"], units=sizes, batch=batch)
    return statistic


@pytest.mark.parametrize("make", STATISTICS, ids=NAMES)
def test_sums_of_several_processes_join_to_those_of_one_to_the_last_bit(make: Make) -> None:
    probe, alone = tiny_probe("swin"), run(make, "swin")
    images = noise(probe, sum(SIZES))
    processes: list[UnitSums] = []
    joined = make()
    for units in ([3, 4], [0, 1, 2]):
        prepare(probe, [joined], ["layer:1"], units=len(SIZES), batch=3)
        starts = np.cumsum([0, *SIZES])
        for unit in units:
            feed_unit(probe, images[starts[unit] : starts[unit + 1]], unit)
        assert probe.unit_sums is not None
        processes.append(probe.unit_sums)
    for node, of_node in processes[0].nodes.items():
        file = io.BytesIO()
        write_sums(of_node, file)
        processes[1].add_node(node, read_sums(io.BytesIO(file.getvalue())))
    processes[1].whole()
    expected, found = sums(alone), sums(joined)
    assert found.keys() == expected.keys()
    for name, arrays in expected.items():
        for state, array in arrays.items():
            assert np.array_equal(found[name][state], array), (name, state)


def feed_unit(probe: HeadProbe, images: Tensor, unit: int) -> None:
    """Send one unit under its own number; a process of several never sees the others."""
    for first in range(0, max(len(images), 1), 3):
        rows = torch.arange(first, min(first + 3, len(images)))
        labels = torch.zeros(len(rows), dtype=torch.int64)
        with torch.inference_mode():
            probe.test_step(ImageBatch(images[rows], labels, unit, rows, first + 3 >= len(images)), 0)


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("make", [lambda: AttentionSums(examples=0), SpectrumSums], ids=NAMES[:2])
def test_one_pass_is_two_halves_to_1e_12(make: Make, kind: str) -> None:
    whole, halves = sums(run(make, kind, [16], batch=4)), sums(run(make, kind, [8, 8], batch=4))
    for name, arrays in whole.items():
        for key, array in arrays.items():
            np.testing.assert_allclose(halves[name][key].astype(float), array.astype(float), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_similarities_do_not_depend_on_units_and_batches(kind: str, batch: int) -> None:
    def make() -> SimilaritySums:
        return SimilaritySums(noise_floor=False, groups=0)

    one, other = run(make, kind, [16], batch=16), run(make, kind, [5, 0, 11], batch=batch)
    assert isinstance(one, SimilaritySums)
    assert isinstance(other, SimilaritySums)
    expected, found = one.matrices(), other.matrices()
    for measure in one.measures:
        np.testing.assert_allclose(found[measure].astype(float), expected[measure].astype(float), atol=2e-5)


@pytest.mark.parametrize("units", [1, 2, 7, 15, 16, 17, 100])
@pytest.mark.parametrize("groups", [0, 2, 16])
def test_every_piece_of_every_unit_has_one_place_in_one_group(units: int, groups: int) -> None:
    probe, statistic = tiny_probe("vit"), SimilaritySums(groups=groups)
    prepare(probe, [statistic], units=units)
    pieces = units * -(-groups // units) if groups else units
    places = [statistic.group_of(piece) for piece in range(pieces)]
    sizes = [places.count(group) for group in range(max(groups, 1))]
    assert places == sorted(places)
    assert sum(sizes) == pieces
    assert max(sizes) - min(sizes) <= 1


def test_groups_of_images_are_about_equal_where_all_images_are_in_one_unit() -> None:
    statistic = run(lambda: SimilaritySums(groups=4), "vit", [128], batch=16)
    assert isinstance(statistic, SimilaritySums)
    assert statistic.comparisons()["baseline"][0].sizes == (32, 32, 32, 32)


def test_a_unit_that_was_not_finished_is_an_error() -> None:
    probe, statistic = tiny_probe("vit"), AttentionSums()
    prepare(probe, [statistic], units=2, batch=3)
    with pytest.raises(RunError, match="1 of 2 units"):
        feed(probe, noise(probe, 3), [3], batch=3)
    with pytest.raises(RunError, match="attention statistics were not added up"):
        statistic.tables()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 1}, "2 to 16, or 0"),
        ({"groups": 17}, "2 to 16, or 0"),
        ({"scope": "all", "groups": 4}, "only for the scope 'within'"),
        ({"variance": 0.0}, "variance"),
        ({"pairs": [(0, 1)]}, "pairs"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    probe = tiny_probe("vit")
    with pytest.raises(UsageError, match=message):
        prepare(probe, [SimilaritySums(**options)])  # type: ignore[arg-type]
