import copy
import hashlib
import itertools
import pickle

import pytest

from headprobe.masks import MaskSpec, MaskSpecError, NamedMask, expand_all

SWIN = (3, 3, 6, 6, 12, 12, 12, 12, 12, 12, 24, 24)
TINY = (2, 1, 3)
EVERY = {(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)}


def expand(text: str, shape: tuple[int, ...] = TINY) -> list[NamedMask]:
    return MaskSpec(text).expand(shape, "tiny")


def by_hash(word: str, seed: int, heads: set[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted(heads, key=lambda head: hashlib.sha256(f"{word}:{seed}:{head[0]}.{head[1]}".encode()).hexdigest())


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("all", EVERY),
        ("layer:2", {(2, 0), (2, 1), (2, 2)}),
        ("layer:0-1", {(0, 0), (0, 1), (1, 0)}),
        ("layer:0-2/2", EVERY - {(1, 0)}),
        ("index:0", {(0, 0), (1, 0), (2, 0)}),
        ("index:1", {(0, 1), (2, 1)}),
        ("index:1-2", {(0, 1), (2, 1), (2, 2)}),
        ("head:2.1", {(2, 1)}),
        ("head:2.0-2", {(2, 0), (2, 1), (2, 2)}),
        ("head:0-2.0", {(0, 0), (1, 0), (2, 0)}),
        ("head:0,2.1", {(0, 1), (2, 1)}),
        ("layer:1+head:2.2+none", {(1, 0), (2, 2)}),
        ("layer:1+layer:1", {(1, 0)}),
        ("random:0:0", set()),
        ("random:6:3", EVERY),
        ("random:2:7", set(by_hash("random", 7, EVERY)[:2])),
        ("random:2", set(by_hash("random", 0, EVERY)[:2])),
        ("one-per-layer:4:1", {(1, 0)}),
        ("keep:layer:2", EVERY - {(2, 0), (2, 1), (2, 2)}),
        ("keep:layer:2+head:0.1", {(0, 0), (1, 0)}),
        ("layer:0+keep:head:0.1", EVERY - {(0, 1)} | {(0, 1)}),
        ("layer:2+keep:head:0.1", EVERY - {(0, 1)}),
        ("keep:none", EVERY),
        ("layer:1+keep:all", {(1, 0)}),
        ("all+keep:layer:1", EVERY),
    ],
)
def test_a_spec_masks_these_heads(text: str, masked: set[tuple[int, int]]) -> None:
    (named,) = expand(text)
    assert named.mask.masked == masked
    assert named.mask.heads_per_layer == TINY
    assert named.test_families == ()


@pytest.mark.parametrize("text", ["none", "none+none", "keep:all", "keep:all+head:0.0"])
def test_none_is_no_mask_as_the_baseline_always_runs(text: str) -> None:
    assert expand(text) == []
    assert MaskSpec(text).canonical == "none"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("layer:3,1,2", "layer:1-3"),
        ("head:5.1+layer:3", "layer:3+head:5.1"),
        ("layer:3+layer:1+none", "layer:1,3"),
        ("index:2+layer:1+index:0", "layer:1+index:0,2"),
        ("head:3.1+head:3.0", "head:3.0,1"),
        ("head:0.1+head:2.1+head:1.1", "head:0-2.1"),
        ("head:2.5+head:0-1.1+head:1.0", "head:0.1+head:1.0,1+head:2.5"),
        ("random:24", "random:24:0"),
        ("random:6+random:6:0", "random:6:0"),
        ("random:36,0-30/6:4,3,2,1,0", "random:0-36/6:0-4"),
        ("one-per-layer:7:11,10", "one-per-layer:7:10,11"),
        ("all+layer:3", "all"),
        ("keep:none", "all"),
        ("keep:all", "none"),
        ("layer:3+keep:layer:1+all", "layer:3"),
        ("keep:head:1.2+layer:3", "keep:layer:3+head:1.2"),
        ("layer:3+keep:head:1.2", "layer:3+keep:head:1.2"),
        ("none+keep:none+layer:3", "keep:layer:3"),
        ("each:head+layer:3", "layer:3+each:head"),
        ("each:head+keep:none", "each:head+keep:none"),
        ("each:pair+layer:3", "layer:3+each:pair"),
        ("keep:each:pair:all", "keep:each:pair:all"),
        ("subsets:layer+none", "subsets:layer"),
        ("grow:random:1,0", "grow:random:0,1"),
        ("grow:a.csv:c", "grow:a.csv:c:least"),
        ("grow:a.csv:c:most:3,2,1", "grow:a.csv:c:most:1-3"),
        ("file:a b.json", "file:a b.json"),
    ],
)
def test_the_canonical_text_is_one_for_all_ways_to_write_a_spec(text: str, canonical: str) -> None:
    assert MaskSpec(text).canonical == canonical
    assert MaskSpec(canonical).canonical == canonical


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("each:layer", ["layer:0", "layer:1", "layer:2"]),
        ("each:index", ["index:0", "index:1", "index:2"]),
        ("each:head", ["head:0.0", "head:0.1", "head:1.0", "head:2.0", "head:2.1", "head:2.2"]),
        ("random:0-6/6:1,3", ["random:0:1", "random:6:1", "random:0:3", "random:6:3"]),
        ("random:1,2", ["random:1:0", "random:2:0"]),
        ("one-per-layer:0-2", ["one-per-layer:0", "one-per-layer:1", "one-per-layer:2"]),
        ("one-per-layer:0-1:0,2", ["one-per-layer:0:0,2", "one-per-layer:1:0,2"]),
        ("grow:random:4", [f"random:{count}:4" for count in range(1, 7)]),
        ("keep:each:layer", ["keep:layer:0", "keep:layer:1", "keep:layer:2"]),
        ("layer:2+each:head", ["layer:2+head:0.0", "layer:2+head:0.1", "layer:2+head:1.0"]),
        ("layer:2+each:layer", ["layer:0,2", "layer:1,2"]),
        ("head:0.1+keep:each:layer", ["head:0.1+keep:layer:0", "head:0.1+keep:layer:1", "head:0.1+keep:layer:2"]),
        ("keep:layer:2+each:head", ["keep:layer:2+head:0.0", "keep:layer:2+head:0.1", "keep:layer:2+head:1.0"]),
        ("none+each:layer", ["layer:0", "layer:1", "layer:2"]),
        ("subsets:layer", ["layer:0", "layer:1", "layer:2", "layer:0,1", "layer:0,2", "layer:1,2", "layer:0-2"]),
        ("layer:0+subsets:layer", ["layer:0,1", "layer:0,2", "layer:0-2"]),
        ("keep:grow:random:4", [f"keep:random:{count}:4" for count in range(1, 7)]),
    ],
)
def test_many_masks_have_these_names_and_one_test_family(text: str, names: list[str]) -> None:
    masks = expand(text)
    assert [mask.name for mask in masks] == names
    assert {mask.test_families for mask in masks} == {(MaskSpec(text).canonical,)}


SINGLE = ["head:0.0", "head:0.1", "head:1.0", "head:2.0", "head:2.1", "head:2.2"]


@pytest.mark.parametrize(
    ("text", "singles", "pairs"),
    [
        ("each:pair", SINGLE, ["head:0.0,1", "head:2.0,1", "head:2.0,2", "head:2.1,2"]),
        ("keep:each:pair", [f"keep:{head}" for head in SINGLE], [f"keep:head:{two}" for two in ("0.0,1", "2.0,1")]),
        (
            "head:1.0+each:pair",
            ["head:0,1.0", "head:0.1+head:1.0", "head:1,2.0", "head:1.0+head:2.1", "head:1.0+head:2.2"],
            ["head:0.0,1+head:1.0", "head:1.0+head:2.0,1", "head:1.0+head:2.0,2", "head:1.0+head:2.1,2"],
        ),
        ("each:pair:all", SINGLE, ["head:0.0,1", "head:0,1.0", "head:0,2.0", "head:0.0+head:2.1", "head:0.0+head:2.2"]),
    ],
)
def test_pairs_come_after_the_single_heads_which_are_tested_as_each_head(
    text: str, singles: list[str], pairs: list[str]
) -> None:
    masks = expand(text)
    assert [mask.name for mask in masks][: len(singles + pairs)] == singles + pairs
    families = {mask.name: mask.test_families for mask in masks}
    assert {families[name] for name in singles} == {
        (MaskSpec(text).canonical.replace("pair:all", "head").replace("pair", "head"),)
    }
    assert {families[name] for name in pairs} == {(MaskSpec(text).canonical,)}


@pytest.mark.parametrize("shape", [TINY, SWIN, (4, 4), (1, 2)])
def test_pairs_and_sets_are_all_that_there_are(shape: tuple[int, ...]) -> None:
    heads = [(layer, head) for layer, count in enumerate(shape) for head in range(count)]
    every = {frozenset(pair) for pair in itertools.combinations(heads, 2)}
    within = {pair for pair in every if len({layer for layer, _ in pair}) == 1}
    singles = {frozenset([head]) for head in heads}
    layers = [frozenset(head for head in heads if head[0] == layer) for layer in range(len(shape))]
    unions = {
        frozenset().union(*chosen)
        for size in range(1, len(layers) + 1)
        for chosen in itertools.combinations(layers, size)
    }
    for text, sets in (("each:pair", singles | within), ("each:pair:all", singles | every), ("subsets:layer", unions)):
        found = [mask.mask.masked for mask in expand(text, shape)]
        assert len(found) == len(sets)
        assert set(found) == sets
        for mask in expand(text, shape)[:300]:
            assert MaskSpec(mask.name).canonical == mask.name
            assert MaskSpec(mask.name).expand(shape, "tiny")[0].mask == mask.mask


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        (
            "each:pair",
            (1, 1, 1),
            "each layer of tiny has a single head: there are no pairs of heads for each:pair; pairs",
        ),
        ("each:pair:all", (1,), "tiny has a single head: there are no pairs of heads for each:pair:all"),
        ("each:pair:all", (500,), "125,250 masks are too many: at most 100,000; each:pair takes pairs within"),
        (
            "subsets:layer",
            (2,) * 17,
            "tiny has 17 layers, which have 131,071 sets: at most 100,000 masks; take each:layer",
        ),
    ],
)
def test_pairs_and_sets_that_no_one_can_run_are_refused(text: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(MaskSpecError) as refused:
        expand(text, shape)
    assert refused.value.reason.startswith(reason)
    assert refused.value.column == 0


def test_sixteen_layers_still_have_all_their_sets() -> None:
    assert len(expand("subsets:layer", (1,) * 16)) == 2**16 - 1


def test_a_form_of_many_masks_is_a_test_family_even_of_one() -> None:
    assert [(mask.name, mask.test_families) for mask in expand("each:layer", (4,))] == [("layer:0", ("each:layer",))]


@pytest.mark.parametrize(
    ("text", "count"), [("each:layer", 12), ("each:index", 24), ("each:head", 138), ("grow:random:0", 138)]
)
def test_swin_has_as_many_masks(text: str, count: int) -> None:
    assert len(expand(text, SWIN)) == count


def test_an_index_of_swin_hits_only_the_layers_that_have_it() -> None:
    (mask,) = expand("index:20", SWIN)
    assert mask.mask.masked == {(10, 20), (11, 20)}


@pytest.mark.parametrize(
    ("text", "curve", "step"),
    [
        ("layer:2", "by_layer", 2),
        ("index:2", "by_index", 2),
        ("head:2.1", "head_01", 2),
        ("random:4:3", "random_seed_3", 4),
        ("random:0:0", "random_seed_0", 0),
        ("one-per-layer:5", "one_per_layer", 5),
        ("one-per-layer:5:0,2", "one_per_layer_0_2", 5),
        ("keep:layer:2", "keep_by_layer", 2),
        ("all", "heads_masked", 6),
        ("keep:none", "heads_masked", 6),
        ("layer:0+keep:none", "heads_masked", 6),
        ("layer:2+layer:2+keep:all", "by_layer", 2),
        ("layer:0-1", "heads_masked", 3),
        ("head:2.0-2", "heads_masked", 3),
        ("layer:1+head:0.0", "heads_masked", 2),
        ("each:layer", "by_layer", 0),
        ("each:head", "head_00", 0),
        ("grow:random:3", "random_seed_3", 1),
        ("keep:each:layer", "keep_by_layer", 0),
        ("keep:random:4:3", "keep_random_seed_3", 2),
        ("keep:grow:random:3", "keep_random_seed_3", 5),
        ("layer:2+each:layer", "layer_2_by_layer", 0),
        ("head:2.1+each:layer", "head_2_1_by_layer", 0),
        ("layer:2+keep:each:layer", "layer_2_keep_by_layer", 0),
        ("keep:layer:2+each:layer", "keep_layer_2_by_layer", 0),
        (
            "each:layer+keep:layer:0-1",
            "kept_layer_0_1_" + hashlib.sha256(b"layer:0,1").hexdigest()[:6] + "_by_layer",
            0,
        ),
        ("layer:1+head:0.1+each:layer", "layer_1_head_0_1_XX_by_layer", 0),
    ],
)
def test_the_first_mask_is_a_point_of_this_curve(text: str, curve: str, step: int) -> None:
    curve = curve.replace("XX", hashlib.sha256(b"layer:1+head:0.1").hexdigest()[:6])
    first = expand(text)[0]
    assert (first.curve, first.step) == (curve, step)


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("layer:12", 6, "swin_t has no layer 12: its layers are 0 to 11, got 12"),
        ("layer:3,40", 8, "swin_t has no layer 40"),
        ("layer:9-15", 8, "swin_t has no layer 15"),
        ("layer:20-25", 6, "swin_t has no layer 20"),
        ("layer:0-15/6+head:1.1", 8, "swin_t has no layer 12"),
        ("index:24", 6, "no layer of swin_t has head 24: its indices are 0 to 23, got 24"),
        ("index:20-30", 9, "no layer of swin_t has head 30"),
        ("head:12.1", 5, "swin_t has no layer 12"),
        ("head:0.3", 7, "swin_t has no head 0.3: layer 0 has heads 0 to 2"),
        ("head:3,11.5-8", 12, "swin_t has no head 3.8: layer 3 has heads 0 to 5"),
        ("layer:1+keep:head:0-11.1,3", 25, "swin_t has no head 0.3: layer 0 has heads 0 to 2"),
        ("random:139", 7, "swin_t has 138 heads: expected 0 to 138 of them, got 139"),
        ("random:0-200/50:3", 9, "swin_t has 138 heads: expected 0 to 138 of them, got 200"),
        ("one-per-layer:1:12", 16, "swin_t has no layer 12"),
        ("grow:random:0-99999", 0, "13,800,000 masks are too many"),
        ("layer:1+keep:all+layer:99", 23, "swin_t has no layer 99"),
        ("all+layer:99", 10, "swin_t has no layer 99"),
        ("all+each:head", 4, "no mask is left: on swin_t, each:head changes nothing"),
        ("keep:all+each:layer", 9, "no mask is left"),
        ("keep:none+layer:3+each:layer+layer:0-11", 18, "no mask is left"),
    ],
)
def test_what_a_model_lacks_is_shown_in_the_users_text_with_the_models_range(
    text: str, column: int, reason: str
) -> None:
    with pytest.raises(MaskSpecError) as error:
        MaskSpec(text).expand(SWIN, "swin_t")
    shown_reason, shown_text, caret = str(error.value).split("\n")
    assert reason in shown_reason
    assert (shown_text, caret) == (text, " " * column + "^")


def test_a_range_of_one_is_said_plainly() -> None:
    with pytest.raises(MaskSpecError, match="layer 1 has heads only 0"):
        expand("head:1.1")


def test_specs_unite_and_drop_names_that_come_twice() -> None:
    specs = [MaskSpec("layer:1"), MaskSpec("none"), MaskSpec("head:0.0"), MaskSpec("layer:1+none")]
    assert [variant.mask.name for variant in expand_all(specs, TINY, "tiny")] == ["layer:1", "head:0.0"]


@pytest.mark.parametrize("texts", [["layer:1", "each:layer"], ["each:layer", "layer:1"]])
def test_a_test_family_keeps_the_member_that_is_also_given_alone(texts: list[str]) -> None:
    masks = expand_all([MaskSpec(text) for text in texts], TINY, "tiny")
    assert sorted((one.mask.name, one.mask.test_families) for one in masks) == [
        (f"layer:{i}", ("each:layer",)) for i in range(3)
    ]


@pytest.mark.parametrize("texts", [["random:1-4:0", "grow:random:0"], ["grow:random:0", "random:1-4:0"]])
def test_a_mask_belongs_to_every_test_family_that_names_it(texts: list[str]) -> None:
    masks = expand_all([MaskSpec(text) for text in texts], TINY, "tiny")
    both = ("grow:random:0", "random:1-4:0")
    expected = {f"random:{count}:0": both if count <= 4 else both[:1] for count in range(1, 7)}
    assert {one.mask.name: one.mask.test_families for one in masks} == expected
    assert len(masks) == 6


def test_one_of_many_lies_on_their_curve_also_where_it_was_given_alone_before() -> None:
    masks = expand_all([MaskSpec("layer:0,2"), MaskSpec("layer:2+each:layer")], TINY, "tiny")
    assert (masks[0].mask.name, masks[0].mask.curve) == ("layer:0,2", "layer_2_by_layer")


def test_no_specs_are_no_masks() -> None:
    assert expand_all([], TINY, "tiny") == []


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))])
def test_a_spec_is_text_that_copies_and_pickles(again: object) -> None:
    spec = MaskSpec("layer:2+each:head")
    other = again(spec)  # type: ignore[operator]  # a table of functions
    assert type(other) is MaskSpec
    assert (other, other.canonical, str(other)) == (spec, spec.canonical, "layer:2+each:head")
    assert type(str(other)) is str
    assert other.expand(TINY, "tiny") == spec.expand(TINY, "tiny")
