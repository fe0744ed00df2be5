import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.masks import MaskSpec, MaskSpecError

ERRORS = {
    # nothing there
    "": (0, "the mask spec is empty: write 'none'"),
    "+": (0, "expected a clause here"),
    "layer:3+": (8, "expected a clause here"),
    "+layer:3": (0, "expected a clause here"),
    "layer:3++head:1.1": (8, "expected a clause here"),
    # words
    "3:5": (0, "every clause starts with a word, such as layer:3 or head:3.1, got '3:5'"),
    "0-5": (0, "every clause starts with a word"),
    "layer:3+1.2": (8, "every clause starts with a word, such as layer:3 or head:3.1, got '1.2'"),
    ":3": (0, "every clause starts with a word"),
    "laye:3": (0, "got 'laye': did you mean 'layer'?"),
    "layer:1+laye:2": (8, "got 'laye': did you mean 'layer'?"),
    "layers:3": (0, "did you mean 'layer'?"),
    "Layer:3": (0, "got 'Layer': did you mean 'layer'?"),
    "ALL": (0, "did you mean 'all'?"),
    "one_per_layer:3": (0, "did you mean 'one-per-layer'?"),
    "keep:heads:1.2": (5, "did you mean 'head'?"),
    "xyzzy": (
        0,
        "expected none, all, layer, index, head, random, one-per-layer, file, each, subsets, grow or keep, got 'xyzzy'",
    ),
    # characters
    "layer:3 + head:1.2": (7, "no blanks"),
    " layer:3": (0, "no blanks"),
    "layer:3\n": (7, "no blanks"),
    "layer: 3": (6, "no blanks"),
    "layer:3*": (7, "got '*'"),
    "layer:3;": (7, "got ';'"),
    "läyer:3": (1, "got 'ä'"),
    "head:1.٣": (7, "got '٣'"),
    "layer:1\N{EN DASH}3": (7, "got '\N{EN DASH}'"),
    # none and all
    "none:3": (4, "none takes no value"),
    "all:3": (3, "all takes no value"),
    # layer, index
    "layer": (5, "layer takes layer numbers: write layer:3"),
    "layer:": (6, "expected a layer number here"),
    "layer:3,": (8, "expected a layer number here"),
    "layer:-3": (6, "never negative"),
    "layer:5-3": (6, "write 3-5, got 5-3"),
    "layer:03": (6, "no leading zeros: write 3, got 03"),
    "layer:3.1": (7, "a single head is head:3.1"),
    "layer:3:4": (7, "layer takes layer numbers"),
    "layer:0-999999999": (6, "too many: at most 100,000"),
    "index": (5, "index takes head numbers"),
    "index:x": (6, "expected a head number"),
    # head
    "head": (4, "head takes LAYER.HEAD"),
    "head:": (5, "head takes LAYER.HEAD"),
    "head:3": (5, "write head:3.1 for head 1 of layer 3, got '3'"),
    "head:3.": (7, "expected a head number here"),
    "head:.1": (5, "expected a layer number here"),
    "head:3.1.2": (8, "head:1.2+head:3.4"),
    "head:1.2,3.4": (10, "head:1.2+head:3.4"),
    "head:3:1": (6, "head takes LAYER.HEAD"),
    "head:0-9999.0-9999": (5, "100,000,000 heads are too many"),
    # random, one-per-layer
    "random": (6, "random takes COUNT or COUNT:SEED"),
    "random:x": (7, "expected a count number"),
    "random:3:": (9, "expected a seed number here"),
    "random:3:4:5": (10, "random takes COUNT or COUNT:SEED"),
    "random:0-9999:0-9999": (7, "100,000,000 masks are too many"),
    "one-per-layer": (13, "one-per-layer takes SEED"),
    "one-per-layer:0:1:2": (17, "one-per-layer takes SEED"),
    # file
    "file": (4, "file takes a PATH"),
    "file:": (5, "expected a PATH here"),
    "file:C:\\mask.json": (6, "anything but ':' and '+'"),
    "file:a+b.json": (7, "got 'b.json': a PATH may hold anything but ':' and '+'"),
    "keep:file:a+b.json": (12, "got 'b.json'"),
    "file:a\tb": (6, "printable characters only, got '\\t'"),
    # keep
    "keep": (4, "keep: needs a clause"),
    "keep:": (5, "keep: needs a clause"),
    "keep:+layer:3": (5, "keep: needs a clause"),
    "keep:layer:1+keep:layer:2": (13, "a spec has one keep"),
    "keep:layer:1+keep": (13, "a spec has one keep"),
    "keep:keep:layer:1": (5, "a spec has one keep"),
    # each
    "each": (4, "each takes layer, index, head or pair"),
    "each:": (5, "expected layer, index, head or pair after each:, got ''"),
    "each:heads": (5, "expected layer, index, head or pair after each:, got 'heads': did you mean 'head'?"),
    "each:layer:3": (10, "each takes layer, index, head or pair"),
    "each:pairs": (5, "got 'pairs': did you mean 'pair'?"),
    "each:pair:": (10, "expected all after each:pair:, got ''"),
    "each:pair:al": (10, "expected all after each:pair:, got 'al': did you mean 'all'?"),
    "each:pair:all:3": (13, "each takes layer, index, head or pair"),
    "each:pair+each:head": (10, "a spec has one form of many masks, and each:pair is one already"),
    # subsets
    "subsets": (7, "subsets takes layer"),
    "subsets:": (8, "expected layer after subsets:, got ''"),
    "subsets:head": (8, "expected layer after subsets:, got 'head'"),
    "subsets:layer:3": (13, "subsets takes layer"),
    "subset:layer": (0, "did you mean 'subsets'?"),
    "each:layer+each:head": (11, "a spec has one form of many masks, and each:layer is one already"),
    "random:1-3+keep:grow:random:0": (16, "a spec has one form of many masks, and random:1-3 is one already"),
    # grow
    "grow": (4, "grow takes random:SEEDS, PATH:COLUMN or calibration:SCORE"),
    "grow:heads.csv": (14, "grow takes random:SEEDS, PATH:COLUMN or calibration:SCORE"),
    "grow:random": (11, "grow:random takes SEEDS"),
    "grow:random:0:5": (13, "grow:random takes SEEDS"),
    "grow::drop_pp": (5, "expected a PATH here"),
    "grow:a.csv:": (11, "expected a column's name here"),
    "grow:a.csv:dröp": (13, "got 'ö'"),
    "grow:a.csv:drop:mos": (
        16,
        "expected least or most (which heads are masked first), got 'mos': did you mean 'most'?",
    ),
    "grow:a.csv:drop:5": (16, "expected least or most"),
    "grow:a.csv:drop:most:x": (21, "expected a count number"),
    "grow:a.csv:drop:most:1:2": (22, "grow takes random:SEEDS, PATH:COLUMN or calibration:SCORE"),
}


@pytest.mark.parametrize("text", ERRORS)
def test_the_error_names_the_culprit_and_the_caret_is_exactly_below_it(text: str) -> None:
    column, reason = ERRORS[text]
    with pytest.raises(MaskSpecError) as error:
        MaskSpec(text)
    shown_reason, shown_text, caret = str(error.value).split("\n")
    assert reason in shown_reason
    assert shown_text == "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    assert caret == " " * column + "^"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (185, "YAML reads a bare 3:5 as 185, so write head:3.5, got 185"),
        (3.1, "so write head:3.1, got 3.1"),
        (True, "YAML reads on, off, yes and no as true and false, got True"),
        (None, "write none for the unmasked model"),
        ({"layer": 3}, "YAML reads 'layer: 3' as a mapping, so write layer:3 without a blank"),
        (["layer:3"], "got ['layer:3']"),
        (b"layer:3", "got b'layer:3'"),
    ],
)
def test_what_is_no_text_is_refused_with_how_to_write_it(value: object, reason: str) -> None:
    with pytest.raises(MaskSpecError) as error:
        MaskSpec(value)  # type: ignore[arg-type]  # the point of the test
    shown_reason, shown, caret = str(error.value).split("\n")
    assert reason in shown_reason
    assert (shown, caret) == (repr(value), "^")


@pytest.mark.parametrize("path", ["run 1/mask.json", "~/m*sk.json", "a,b/../c-d.json", "日本.json", "100%#?.json"])
def test_a_path_may_hold_anything_but_colon_and_plus(path: str) -> None:
    assert MaskSpec(f"file:{path}").canonical == f"file:{path}"
    assert MaskSpec(f"grow:{path}:drop_pp").canonical == f"grow:{path}:drop_pp:least"


@given(st.text(alphabet="alyerhdknoifgpw0123456789:.,-+/_ \n*é", max_size=30))
def test_any_text_parses_or_fails_with_a_caret_inside_it(text: str) -> None:
    try:
        canonical = MaskSpec(text).canonical
    except MaskSpecError as error:
        shown, column = error.spec, error.column
    else:
        assert MaskSpec(canonical).canonical == canonical
        return
    assert shown == text
    assert 0 <= column <= len(text)


def test_the_largest_spec_allowed_is_read_at_once() -> None:
    start = time.process_time()
    assert MaskSpec("layer:0-99999+head:0-99999.3+random:0-99999").canonical.startswith("layer:0-99999+head:")
    assert time.process_time() - start < 2
