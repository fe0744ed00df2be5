"""Tables that follow from a run's files: written beside them, printed, and made again from the files alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from headprobe.report.table import importance_table, index_table, orders_table
from headprobe.run.curves import curve_rows
from headprobe.run.games import games
from headprobe.run.importance import importance_of
from headprobe.run.index_null import null_rows
from headprobe.run.interactions import interaction_rows, interactions_in_words
from headprobe.run.load import Row, Run
from headprobe.run.order_areas import order_rows
from headprobe.run.results import write_rows
from headprobe.run.shapley import shapley_in_words, shapley_rows, too_few_orders


class Derived(NamedTuple):
    """One table.

    Attributes:
        file: Its name.
        rows: Makes its rows; none where the run has not the masks for it.
        shown: Makes what is printed of it; None where nothing is.
    """

    file: str
    rows: Callable[[Run], Sequence[Row]]
    shown: Callable[[Sequence[Row], Run], Table | str | None] | None = None


def _indices(rows: Sequence[Row], run: Run) -> Table:
    return index_table(rows, len(run.record["model"]["heads_per_layer"]))


def _interactions(run: Run) -> Sequence[Row]:
    return interaction_rows(games(run))


def _shapley(run: Run) -> Sequence[Row]:
    return shapley_rows(games(run))


DERIVED = (
    Derived("importance.csv", importance_of, lambda rows, _: importance_table(rows)),
    Derived("curves.csv", curve_rows),
    Derived("orders.csv", order_rows, lambda rows, _: orders_table(rows)),
    Derived("index_null.csv", null_rows, _indices),
    Derived("interactions.csv", _interactions, lambda rows, _: interactions_in_words(rows)),
    Derived("shapley.csv", _shapley, lambda rows, _: shapley_in_words(rows)),
)


def write_derived(run: Run) -> Iterator[Any]:
    """Write every table that a run has the masks for, and yield what is printed of it.

    Args:
        run: Its files so far.
    """
    for file, make, shown in DERIVED:
        rows = make(run)
        if not rows:
            continue
        write_rows(run.path / file, rows)
        printed = None if shown is None else shown(rows, run)
        if printed is not None and printed != "":
            yield printed
    if few := too_few_orders(games(run)):
        yield few
