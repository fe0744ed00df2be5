import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from headprobe.errors import RunError
from headprobe.metrics.accuracy import PairedAccuracy
from headprobe.metrics.units import UnitSums, tree_sum


def make() -> PairedAccuracy:
    return PairedAccuracy(masks=2, classes=4)


def batch(unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(unit)
    return torch.randn(3, 5 + unit, 4, generator=generator), torch.randint(0, 4, (5 + unit,), generator=generator)


def run(units: list[int], total: int = 5) -> UnitSums:
    sums = UnitSums(total, make)
    for unit in units:
        sums.open(unit).update(*batch(unit))
        sums.close(unit)
    return sums


def test_units_in_any_order_over_any_processes_give_the_same_bits() -> None:
    alone = run([0, 1, 2, 3, 4])
    expected = alone.merged(alone.stacked()).to_arrays()
    for split in ([[4, 2], [0, 1, 3]], [[3], [2, 0], [], [4, 1]]):
        parts = [run(units).stacked() for units in split]
        added = {name: np.asarray(sum(part[name] for part in parts)) for name in parts[0]}
        found = alone.merged(added).to_arrays()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_whole_equals_one_metric_over_all_images() -> None:
    alone = run([0, 1, 2, 3, 4])
    whole = make()
    for unit in range(5):
        whole.update(*batch(unit))
    found, expected = alone.merged(alone.stacked()).to_arrays(), whole.to_arrays()
    for name in expected:
        np.testing.assert_allclose(found[name].astype(float), expected[name].astype(float), rtol=1e-14)


def test_a_missing_unit_is_an_error() -> None:
    sums = run([0, 1, 3, 4])
    with pytest.raises(RunError, match=r"1 missing \[2\], 0 counted double"):
        sums.merged(sums.stacked())


def test_a_unit_counted_by_two_processes_is_an_error() -> None:
    parts = [run([0, 1, 2]).stacked(), run([2, 3, 4]).stacked()]
    added = {name: np.asarray(sum(part[name] for part in parts)) for name in parts[0]}
    with pytest.raises(RunError, match=r"0 missing \[\], 1 counted double \[2\]"):
        run([]).merged(added)


def test_a_unit_sent_again_after_its_end_is_an_error() -> None:
    with pytest.raises(RunError, match="unit 2 of 5 was sent twice"):
        run([2]).open(2)


def test_a_unit_that_never_ended_is_an_error() -> None:
    sums = run([0])
    sums.open(1).update(*batch(1))
    with pytest.raises(RunError, match=r"units \[1\] ended before their last batch"):
        sums.stacked()


@pytest.mark.parametrize("units", [0, 1, 2, 3, 7, 8])
def test_the_tree_adds_neighbours_first(units: int) -> None:
    values = np.random.default_rng(0).normal(size=(units, 3))

    def add(part: NDArray[np.float64]) -> NDArray[np.float64]:
        if len(part) <= 1:
            return part.sum(axis=0)
        half = 1 << (len(part) - 1).bit_length() - 1
        return add(part[:half]) + add(part[half:])

    assert np.array_equal(tree_sum(values), add(values))
