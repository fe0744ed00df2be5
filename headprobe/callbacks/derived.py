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
from headprobe.run.load import Row, RunFiles
from headprobe.run.order_areas import order_rows
from headprobe.run.results import write_rows
from headprobe.run.shapley import shapley_in_words, shapley_rows, too_few_orders


class Derived(NamedTuple):
    """One table.

    Attributes:
        file: Its name.
        rows: Its rows; none where the run has not the masks for it.
        shown: Makes what is printed of it.
    """

    file: str
    rows: Sequence[Row]
    shown: Callable[[Sequence[Row]], Table | str] = lambda _: ""


def write_derived(run: RunFiles) -> Iterator[Any]:
    """Write every table that a run has the masks for, and yield what is printed of it.

    Args:
        run: Its files so far.
    """
    played, layers = games(run), len(run.record["model"]["heads_per_layer"])
    for file, rows, shown in (
        Derived("importance.csv", importance_of(run), importance_table),
        Derived("curves.csv", curve_rows(run)),
        Derived("orders.csv", order_rows(run), orders_table),
        Derived("index_null.csv", null_rows(run), lambda rows: index_table(rows, layers)),
        Derived("interactions.csv", interaction_rows(played), interactions_in_words),
        Derived("shapley.csv", shapley_rows(played), shapley_in_words),
    ):
        if not rows:
            continue
        write_rows(run.path / file, rows)
        if printed := shown(rows):
            yield printed
    if few := too_few_orders(played):
        yield few
