"""Random damage to Parquet files, and to images inside of whole ones: named, or every row once; and nothing else."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.parquet_sets import CLASSES, Outcome, encoded, features, read_all, table
from tests.data.test_decode import noise

CASES = 50  # of each kind
FILES, GROUPS, ROWS = 3, 2, 5  # row groups per file, rows per group
KINDS = ["png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm"]
MODES = ["RGB", "L", "P", "RGB", "RGBA"]


def image_of(number: int) -> bytes:
    mode, kind = MODES[number % len(MODES)], KINDS[number % len(KINDS)]
    return encoded(noise("RGB" if kind in ("jpeg", "ppm") else mode, seed=number), kind)


def rows_of(file: int) -> pa.Table:
    numbers = range(file * GROUPS * ROWS, (file + 1) * GROUPS * ROWS)
    return table([image_of(number) for number in numbers], [number % CLASSES for number in numbers])


def name_of(file: int) -> str:
    return f"{'abc'[file]}.parquet"


def build(folder: Path) -> Outcome:
    """Write the undamaged set and read it."""
    for file in range(FILES):
        pq.write_table(rows_of(file), folder / name_of(file), row_group_size=ROWS, **layout(file))
    whole = read_all(folder / "*.parquet")
    assert (whole.said, len(whole.images)) == ("", FILES * GROUPS * ROWS)
    return whole


def layout(file: int) -> dict[str, object]:
    """Files differ in how they are written: packing, page size, and dictionaries."""
    return [
        {},
        {"compression": "zstd", "data_page_size": 2000, "data_page_version": "2.0"},
        {"compression": "gzip", "use_dictionary": False, "write_page_checksum": True},
    ][file]


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, overwrite, zero, cut, lengthen, shift or replace bytes, once or a few times."""
    damaged = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        # The end of a Parquet file and the beginning of an image say how to read the rest.
        start = draw.choice([0, max(len(damaged) - 1500, 0), draw.randrange(len(damaged) + 1)])
        place = min(start + draw.randrange(1500), max(len(damaged) - 1, 0))
        length = draw.choice([1, 2, 4, 30, 500])
        kind = draw.randrange(7)
        if kind == 0 and damaged:
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind in (1, 2):
            damaged[place : place + length] = draw.randbytes(length) if kind == 1 else bytes(length)
        elif kind == 3:
            del damaged[place:]
        elif kind == 4:
            damaged += draw.randbytes(length)
        elif kind == 5:
            del damaged[place : place + length]
        else:
            other = draw.randrange(len(damaged) + 1)
            damaged[place:place] = damaged[other : other + length]
    return bytes(damaged)


def damaged_file(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.06:
        return draw.choice([b"", image_of(0), b"PAR1", b"PAR1PAR1", b"<html>" * 99, draw.randbytes(3000)])
    return damaged_bytes(content, draw)


def damage_images(path: Path, file: int, draw: random.Random) -> set[tuple[str, int]]:
    """Damage some images of a file, and write it again as a whole one; return where they are."""
    rows = rows_of(file).to_pylist()
    damaged = draw.sample(range(len(rows)), draw.choice([1, 1, 3]))
    for number in damaged:
        image = rows[number]["image"]
        # Sometimes another image takes its place, or only the kind of file that it says to be.
        image["bytes"] = image_of(draw.randrange(99)) if draw.random() < 0.1 else image["bytes"]
        image["bytes"] = damaged_bytes(image["bytes"], draw)
    pq.write_table(pa.Table.from_pylist(rows, schema=features().arrow_schema), path, row_group_size=ROWS)
    return {(f"{path.name} row group {number // ROWS}", number % ROWS) for number in damaged}


def damage_file(path: Path, draw: random.Random) -> None:
    kind = draw.random()
    if kind < 0.05:
        pq.write_table(pq.read_table(path).rename_columns(["label", "image"]), path)
    elif kind < 0.1:
        path.write_bytes(draw.choice([b"", image_of(0), b"PAR1", b"PAR1" * 2, b"<html>" * 99, draw.randbytes(3000)]))
    else:
        path.write_bytes(damaged_bytes(path.read_bytes(), draw))


def check(outcome: Outcome, whole: Outcome, name: str, damaged: set[tuple[str, int]]) -> None:
    """Check what became of a set where `damaged` are the only places that may differ, all in the file `name`."""
    assert not outcome.refusal or name in outcome.refusal
    assert all(failure.startswith(f"{name} row group ") for failure in outcome.failures)
    assert outcome.bad.keys() <= damaged
    for place, image in outcome.images.items():
        assert place in damaged or image == whole.images[place]
    seen = outcome.images.keys() | outcome.bad.keys()
    if outcome.refusal:
        assert not seen
    elif outcome.failures:  # the stream ends there, and the run with it
        assert seen < whole.images.keys()
    else:
        assert seen == whole.images.keys()


def one_case(folder: Path, whole: Outcome, seed: int) -> str:
    """Damage the set by the dice, read it, check what comes, and mend it; return what came in a word."""
    draw = random.Random(seed)
    file = draw.randrange(FILES)
    path = folder / name_of(file)
    content = path.read_bytes()
    try:
        if seed % 2:
            damaged = damage_images(path, file, draw)
        else:
            damage_file(path, draw)
            damaged = {place for place in whole.images if place[0].startswith(path.name)}
        outcome = read_all(folder / "*.parquet")
        check(outcome, whole, path.name, damaged)
        if seed % 2:
            assert not outcome.refusal + "".join(outcome.failures)
    finally:
        path.write_bytes(content)
    return "refused" if outcome.refusal else "failed" if outcome.failures else "bad" if outcome.bad else "counted"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, build(folder)


@pytest.mark.parametrize("seed", range(2 * CASES))
def test_damage_is_named_or_every_row_comes_once(sets: tuple[Path, Outcome], seed: int) -> None:
    assert one_case(*sets, seed)


def test_the_cases_are_of_every_kind(sets: tuple[Path, Outcome]) -> None:
    assert {one_case(*sets, seed) for seed in range(12)} == {"refused", "failed", "bad", "counted"}
