"""Everything a hub can do to a run: each image comes once, or the run ends with one message and loses nothing."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.data.hub_runs import Answer, read_all
from tests.data.mock_hub import EVER, Fault, MockHub, running
from tests.data.parquet_sets import write_files

FIRST, SECOND = "validation-00000", "validation-00001"
IMAGES = 14
OPENS = "/api/datasets/"


@dataclass(frozen=True)
class Case:
    """What goes wrong, what the hub is said to do, and with which remedy (none where the hub recovers)."""

    faults: tuple[Fault, ...]
    said: str = ""
    remedy: str = ""


def mended(said: str, *faults: Fault) -> Case:
    return Case(faults, said)


CASES = {
    "429-twice": mended("answers 429 (too many requests)", Fault(SECOND, 429, times=2, headers={"Retry-After": "0"})),
    "429-bare": mended("answers 429 (too many requests)", Fault(SECOND, 429, times=2)),
    "500-twice": mended("answers 500 (internal server error)", Fault(SECOND, 500, times=2)),
    "503-at-open": mended("answers 503 (service unavailable)", Fault(OPENS, 503, times=2)),
    "reset-twice": mended("breaks the connection", Fault(SECOND, how="reset", times=2)),
    "short-twice": mended("breaks the connection", Fault(SECOND, how="short", times=2)),
    "silent-once": mended("does not answer", Fault(SECOND, how="silent", times=1)),
    "drip": Case((Fault(SECOND, how="drip"),)),
    "429-ever": Case((Fault(SECOND, 429),), "answers 429", "run the same command again to resume"),
    "429-hour": Case(
        (Fault(SECOND, 429, headers={"Retry-After": "3600"}),), "", "asks to wait for 60 minutes: wait until "
    ),
    "429-window": Case(
        (Fault(SECOND, 429, headers={"RateLimit": '"resolvers";r=0;t=299'}),), "", "asks to wait for 5 minutes"
    ),
    "500-ever": Case((Fault(SECOND, 500),), "answers 500", "run the same command again to resume"),
    "reset-ever": Case((Fault(SECOND, how="reset"),), "breaks the connection", "run the same command again to resume"),
    "short-ever": Case((Fault(SECOND, how="short"),), "breaks the connection", "run the same command again to resume"),
    "silent-ever": Case((Fault(SECOND, how="silent"),), "does not answer", "run the same command again to resume"),
    "401-later": Case((Fault(SECOND, 401),), "", "`hf auth login` or HF_TOKEN"),
    "403-later": Case((Fault(SECOND, 403),), "", "terms on the dataset's page, then run the same command again to"),
    "404-later": Case((Fault(SECOND, 404),), "", "--data.revision"),
    "500-at-open": Case((Fault(OPENS, 500),), "answers 500", "run the same command again to resume"),
    "silent-at-open": Case((Fault(OPENS, how="silent"),), "does not answer", "run the same command again to resume"),
}
AT_OPEN = ("500-at-open", "silent-at-open")
RECOVERED = [name for name, case in CASES.items() if not case.remedy]
LOST = [name for name, case in CASES.items() if case.remedy]
WORKERS = (0, 2)
BOTH, SPAWNED, COUNTED = "both", "spawned", "counted"
"""Datasets of single tests: both files fail at once, workers are spawned, requests are counted."""


def served(name: str, workers: int) -> str:
    return f"{name}-with-{workers}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MockHub]:
    with running(write_files(tmp_path_factory.mktemp("served"), [[5, 3], [4, 2]])) as found:
        yield found


@pytest.fixture(scope="module")
def answers(hub: MockHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Return what reading each dataset gave; in two processes, whose start takes seconds, side by side: they wait."""
    homes = {workers: tmp_path_factory.mktemp("home") for workers in WORKERS}

    hub.faults[BOTH] = [Fault("validation-0000", 500, spared=2, times=EVER)]
    hub.faults[SPAWNED] = [Fault(SECOND, 500, times=1)]
    hub.faults[COUNTED] = []
    first: dict[int, dict[str, dict[str, Any]]] = {0: {COUNTED: {"path": f"owner/{COUNTED}"}}, 2: {}}
    last: dict[int, dict[str, dict[str, Any]]] = {0: {}, 2: {
        SPAWNED: {"path": f"owner/{SPAWNED}", "num_workers": 2, "method": "spawn"},
        # on busy cores a worker may meet the outage when the other has given up
        BOTH: {"path": f"owner/{BOTH}", "num_workers": 2, "quiet": 60.0},
    }}  # fmt: skip

    def of(workers: int) -> dict[str, Answer]:
        requests: dict[str, dict[str, Any]] = {**first[workers]}  # a process's first dataset is opened from nothing
        for name, case in CASES.items():
            hub.faults[served(name, workers)] = [Fault(**vars(fault)) for fault in case.faults]
            requests[served(name, workers)] = {"path": f"owner/{served(name, workers)}", "num_workers": workers}
        requests |= last[workers]
        return dict(zip(requests, read_all(homes[workers], hub.address, requests.values()), strict=True))

    with ThreadPoolExecutor() as together:
        return {name: answer for found in together.map(of, WORKERS) for name, answer in found.items()}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", RECOVERED)
def test_every_image_comes_once_where_the_hub_recovers(answers: dict[str, Answer], name: str, workers: int) -> None:
    answer = answers[served(name, workers)]
    assert answer.failures == []
    assert sorted(answer.numbers) == list(range(IMAGES))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", LOST)
def test_a_hub_that_stays_away_ends_the_run_with_file_and_remedy(
    answers: dict[str, Answer], name: str, workers: int
) -> None:
    answer = answers[served(name, workers)]
    (failure,) = answer.failures
    assert CASES[name].remedy in failure
    assert "then run the same command again to resume" in failure
    assert "cannot be read" in failure
    assert "Traceback" not in answer.said
    where = name if name in AT_OPEN else f"{SECOND}-of-00002.parquet"
    assert where in failure


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", [name for name in LOST if name not in AT_OPEN])
def test_what_was_read_before_stays_and_nothing_comes_twice(
    answers: dict[str, Answer], name: str, workers: int
) -> None:
    answer = answers[served(name, workers)]
    assert sorted(answer.numbers) == list(range(8))
    assert sorted(answer.rows) == [[0, row] for row in range(8)]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", CASES)
def test_an_outage_is_one_line_that_says_what_and_until_when(
    answers: dict[str, Answer], name: str, workers: int
) -> None:
    answer = answers[served(name, workers)]
    words = CASES[name].said
    assert len(answer.lines) == (1 if words else 0), answer.said
    for line in answer.lines:
        assert f"headprobe: the hub {words}" in line
        assert ": trying again for up to " in line
        assert ", until " in line
    # nothing of the libraries below us beside it
    assert "Retrying in" not in answer.said
    assert "thrown while requesting" not in answer.said


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", LOST)
def test_waiting_ends_when_it_was_said_to_end(answers: dict[str, Answer], name: str, workers: int) -> None:
    # 3 seconds are allowed, and the answer to the last try takes up to 1 second; an hour is not waited for
    assert answers[served(name, workers)].seconds < 12


def test_two_workers_in_one_outage_say_it_once(answers: dict[str, Answer]) -> None:
    assert len(answers[BOTH].lines) == 1


def test_spawned_workers_wait_and_speak_too(answers: dict[str, Answer]) -> None:
    answer = answers[SPAWNED]
    assert sorted(answer.numbers) == list(range(IMAGES))
    assert [line for line in answer.lines if "the hub answers 500" in line] == answer.lines
    assert len(answer.lines) == 1
    assert "for up to 10 minutes, until " in answer.said


def test_a_process_opens_a_dataset_with_few_requests(hub: MockHub, answers: dict[str, Answer]) -> None:
    assert sorted(answers[COUNTED].numbers) == list(range(IMAGES))
    asked = [line for line in hub.requests if f"/owner/{COUNTED}" in line]
    reads = [line for line in asked if line.startswith("GET /datasets/") and ".parquet" in line]
    assert len(reads) >= 2  # of two files
    assert len(asked) - len(reads) <= 9, asked
