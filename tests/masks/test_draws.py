import hashlib

from hypothesis import given
from hypothesis import strategies as st

from headprobe.masks.draws import one_per_layer, random_order

SWIN = (3, 3, 6, 6, 12, 12, 12, 12, 12, 12, 24, 24)
shapes = st.lists(st.integers(1, 6), min_size=1, max_size=6).map(tuple)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_random_order_is_pinned_for_ever() -> None:
    assert random_order((2, 3), 7) == ((1, 0), (1, 1), (0, 0), (1, 2), (0, 1))
    assert random_order(SWIN, 0)[:4] == ((9, 1), (10, 23), (11, 18), (4, 6))


def test_one_per_layer_is_pinned_for_ever() -> None:
    assert one_per_layer(SWIN, 5) == (
        (0, 2),
        (1, 0),
        (2, 2),
        (3, 2),
        (4, 10),
        (5, 1),
        (6, 6),
        (7, 9),
        (8, 3),
        (9, 9),
        (10, 11),
        (11, 14),
    )


@given(shapes, st.integers(0, 10**9 - 1))
def test_heads_stand_in_the_order_of_the_documented_hash(shape: tuple[int, ...], seed: int) -> None:
    heads = [(layer, head) for layer in range(len(shape)) for head in range(shape[layer])]
    hashes = {sha(f"random:{seed}:{layer}.{head}"): (layer, head) for layer, head in heads}
    assert random_order(shape, seed) == tuple(hashes[key] for key in sorted(hashes))


@given(shapes, st.integers(0, 10**9 - 1))
def test_one_per_layer_takes_the_smallest_hash_of_each_layer(shape: tuple[int, ...], seed: int) -> None:
    expected = []
    for layer, count in enumerate(shape):
        hashes = [sha(f"one-per-layer:{seed}:{layer}.{head}") for head in range(count)]
        expected.append((layer, hashes.index(min(hashes))))
    assert one_per_layer(shape, seed) == tuple(expected)


@given(shapes, st.integers(0, 99), st.integers(1, 6))
def test_a_further_layer_leaves_the_order_of_the_others(shape: tuple[int, ...], seed: int, more: int) -> None:
    longer = random_order((*shape, more), seed)
    assert tuple(head for head in longer if head[0] < len(shape)) == random_order(shape, seed)


def test_seeds_draw_every_head_first_about_equally_often() -> None:
    shape, seeds = (2, 3), 3000
    first = [random_order(shape, seed)[0] for seed in range(seeds)]
    counts = [first.count((layer, head)) for layer, head in random_order(shape, 0)]
    expected = seeds / len(counts)
    assert sum((count - expected) ** 2 / expected for count in counts) < 20.5  # chi-square, 5 degrees, p = 0.001
