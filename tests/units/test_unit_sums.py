"""Unit sums: whoever counted which unit, in which order and in how many runs, the sums are the same bits."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from headprobe.errors import RunError
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy, image_groups
from headprobe.units.coverage import COVERAGE, SCORES, Coverage
from headprobe.units.tree import Arrays, NamedSums, read_sums, write_sums
from headprobe.units.unit_sums import UnitSums

ROWS = [range(size) for size in (5, 6, 7, 8, 9)]


def make() -> PairedAccuracy:
    return PairedAccuracy(masks=2, classes=4)


def batch(unit: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(unit)
    logits, labels = (
        torch.randn(3, 5 + unit, 4, generator=generator),
        torch.randint(0, 4, (5 + unit,), generator=generator),
    )
    return logits, labels, torch.tensor(image_groups(unit, range(5 + unit)))


def count(units: list[int], rows: Sequence[range] | None = ROWS, total: int = 5) -> UnitSums:
    sums = UnitSums(total, make, rows)
    for unit in units:
        opened = sums.open(unit, list(range(5 + unit)), [], f"file {unit}")
        opened.scores.update(*batch(unit))
        opened.rows.labels += batch(unit)[1].tolist()
        sums.close(unit, 80, f"file {unit}")
    return sums


def sent(part: NamedSums) -> dict[str, Arrays]:
    file = io.BytesIO()
    write_sums(part, file)
    return read_sums(io.BytesIO(file.getvalue()))


def arrays(part: NamedSums) -> dict[str, Arrays]:
    return {name: metric.to_arrays() for name, metric in part.items()}


def test_units_in_any_order_over_any_processes_give_the_same_bits() -> None:
    expected = arrays(count([0, 1, 2, 3, 4]).whole())
    for split in ([[4, 2], [0, 1, 3]], [[3], [2, 0], [], [4, 1]]):
        first, *others = (count(units) for units in split)
        for other in others:
            for node, part in other.nodes.items():
                first.add_node(node, sent(part))
        found = arrays(first.whole())
        assert all(np.array_equal(found[name][key], expected[name][key]) for name in expected for key in expected[name])


def test_the_whole_equals_one_metric_over_all_images() -> None:
    whole = make()
    for unit in range(5):
        whole.update(*batch(unit))
    found, expected = count([0, 1, 2, 3, 4]).whole()[SCORES].to_arrays(), whole.to_arrays()
    for name in expected:
        np.testing.assert_allclose(found[name].astype(float), expected[name].astype(float), rtol=1e-14)


def test_a_missing_unit_is_an_error() -> None:
    with pytest.raises(RunError, match="1 of 5 units of the data were not counted: 2"):
        count([0, 1, 3, 4]).whole()


def test_a_unit_counted_by_two_processes_is_an_error() -> None:
    (node, part), *_ = count([2]).nodes.items()
    with pytest.raises(RunError, match="sent twice"):
        count([0, 1, 2]).add_node(node, sent(part))


def test_a_unit_sent_again_after_its_end_is_an_error() -> None:
    with pytest.raises(RunError, match="unit 2 of 5 was sent twice"):
        count([2]).open(2, [0], [], "file")


def test_a_unit_that_never_ended_is_an_error() -> None:
    sums = count([0])
    sums.open(1, [0], [], "file").scores.update(
        *(part[..., :1, :] if part.ndim == 3 else part[:1] for part in batch(1))
    )
    with pytest.raises(RunError, match=r"units \[1\] ended before their last batch"):
        sums.whole()


def test_a_row_that_comes_twice_is_an_error_that_names_the_file() -> None:
    sums = UnitSums(2, make, [range(4), range(4)])
    sums.open(0, [0, 1], [], "a.parquet")
    with pytest.raises(RunError, match=r"row 1 of a\.parquet was sent twice"):
        sums.open(0, [1, 2], [], "a.parquet")


@pytest.mark.parametrize(
    ("rows", "message"), [([0, 1, 3], "rows 2 are missing"), ([0, 1, 2, 3, 4], "rows 4 are too many")]
)
def test_a_unit_that_does_not_give_its_rows_is_an_error(rows: list[int], message: str) -> None:
    sums = UnitSums(1, make, [range(4)])
    sums.open(0, rows, [], "a.parquet")
    with pytest.raises(RunError, match=rf"a\.parquet did not give each of its 4 rows once: {message}"):
        sums.close(0, 80, "a.parquet")


def test_a_gap_is_an_error_also_where_the_size_is_unknown() -> None:
    sums = UnitSums(1, make)
    sums.open(0, [0, 2], [], "a.tar")
    with pytest.raises(RunError, match="rows 1 are missing"):
        sums.close(0, 80, "a.tar")


def test_bad_rows_count_as_rows_and_are_kept() -> None:
    bad = {"unit": 0, "row": 1, "source": "a.parquet", "reason": "empty"}
    sums = UnitSums(1, make, [range(3)])
    sums.open(0, [0, 2], [bad], "a.parquet")
    sums.close(0, 40, "a.parquet")
    coverage = sums.whole()[COVERAGE]
    assert (coverage.rows, coverage.budgets, coverage.bad) == ({0: 3}, {0: 40}, [bad])
    assert vars(Coverage.from_arrays(coverage.to_arrays())) == vars(coverage)


def test_coverage_of_an_older_headprobe_is_read_without_its_labels() -> None:
    arrays = count([0, 1, 2, 3, 4]).whole()[COVERAGE].to_arrays()
    assert arrays["labels"].tolist()[0][:2] == [5, int(batch(0)[1].sum())]
    del arrays["labels"]
    assert Coverage.from_arrays(arrays).label_sums.tolist() == [[0] * 5] * 5


def test_sums_of_other_units_under_a_nodes_name_are_an_error() -> None:
    (part,) = count([2]).nodes.values()
    with pytest.raises(ValueError, match="units 3 to 3 must be there"):
        count([]).add_node((0, 3), sent(part))


def test_sums_of_other_masks_are_an_error() -> None:
    (part,) = count([2]).nodes.values()
    sums = UnitSums(5, lambda: PairedAccuracy(masks=1, classes=4), ROWS)
    sums.open(3, list(range(8)), [], "file").scores.update(batch(3)[0][:2], *batch(3)[1:])
    sums.close(3, 80, "file")
    with pytest.raises(ValueError, match="can be merged"):
        sums.add_node((0, 2), sent(part))
