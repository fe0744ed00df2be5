"""Hand-written loops do the work they say, and headprobe, given the same setting, counts the same."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file

import headprobe
from benchmarks.ours import found, options
from benchmarks.peers import bare_loop, best_batch, layers_with_hooks, timm_loop, with_hooks
from benchmarks.peers.common import BASELINE, Score, Scores, Setting, as_json, attentions, decoded, read, scored
from benchmarks.setting import Materials, prepare, usual
from tests.cli_runs import command

IMAGES = 6
COLUMNS = ("image", "label")
BUNDLED = Path(str(headprobe.__file__)).parent / "data" / "digits" / "test.parquet"


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Give six of the bundled images and the bundled model, in batches of four."""
    file = prepare(usual("digits", "digits_vit", None), IMAGES, 1, 0, tmp_path_factory.mktemp("setting"))
    return replace(read(file), batch=4)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # the other tests keep theirs


def scores_of(prepared: Callable[[Setting], Callable[[], Scores]], setting: Setting) -> Scores:
    loop = prepared(setting)
    with torch.inference_mode():
        return loop()


def with_columns_zeroed(setting: Setting, layer: int, heads: list[int]) -> tuple[int, float]:
    """Return what is right, and the mean NLL, when heads' columns of the projection are zero in the weights."""
    model = timm.create_model(setting.model, num_classes=setting.classes, **setting.options)
    state = load_file(setting.weights)
    for head in heads:
        state[f"blocks.{layer}.attn.proj.weight"][:, 16 * head : 16 * (head + 1)] = 0
    model.load_state_dict(state)
    images, labels = decoded(setting)
    with torch.inference_mode():
        logits = model.eval()(images)
    nll = -logits.double().log_softmax(dim=1)[range(len(labels)), labels]
    return int((logits.argmax(dim=1) == labels).sum()), float(nll.mean())


def test_the_copied_images_are_images_of_the_data_with_their_labels(setting: Setting) -> None:
    bundled, copied = pq.read_table(BUNDLED), pq.read_table(setting.images)
    there = {
        (cell["bytes"], label) for cell, label in zip(*(bundled[name].to_pylist() for name in COLUMNS), strict=True)
    }
    taken = list(zip(*(copied[name].to_pylist() for name in COLUMNS), strict=True))
    assert len(set(taken)) == IMAGES
    assert set(taken) <= there


def agrees(score: Score, expected: tuple[int, float]) -> None:
    assert score.images == IMAGES
    assert score.right == expected[0]
    assert score.mean_nll == pytest.approx(expected[1], abs=1e-5)


def test_scores_add_up_and_unknown_nll_stays_unknown() -> None:
    both = scored(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])) + Score(1, 2, 0.0)
    assert (both.right, both.images) == (2, 4)
    assert both.mean_nll == pytest.approx(math.log(2) / 2)
    assert as_json({"a": both + Score(1, 1, None), "b": both}) == {
        "top1": {"a": 3, "b": 2},
        "nll": {"b": both.mean_nll},
    }


def test_hooks_count_what_zeroed_weights_count(setting: Setting) -> None:
    heads = scores_of(with_hooks.prepared, setting)
    assert len(heads) == 1 + 24
    for layer, head in ((0, 2), (3, 0), (5, 3)):
        agrees(heads[f"head:{layer}.{head}"], with_columns_zeroed(setting, layer, [head]))
    layers = scores_of(layers_with_hooks.prepared, setting)
    for layer in range(6):
        agrees(layers[f"layer:{layer}"], with_columns_zeroed(setting, layer, [0, 1, 2, 3]))
    assert layers["layer:0"].right < layers[BASELINE].right


def test_loops_that_decode_as_they_go_count_what_hooks_count(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = scores_of(layers_with_hooks.prepared, setting)
    monkeypatch.setattr("sys.argv", ["bare_loop", "setting.json", "0"])
    bare, timm_own = scores_of(bare_loop.prepared, setting), scores_of(timm_loop.prepared, setting)
    assert list(bare) == [BASELINE, "layer:0"]
    assert list(timm_own) == [BASELINE]
    for name, score in [*bare.items(), *timm_own.items()]:
        assert (score.right, score.images) == (layers[name].right, IMAGES)
        assert score.mean_nll == pytest.approx(layers[name].mean_nll, abs=1e-5)


def test_headprobe_given_the_same_setting_counts_the_same(setting: Setting, tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *options(setting), "--mask-spec", "each:layer")
    assert ended.code == 0, ended.err
    ours, by_hand = found(tmp_path, ""), as_json(scores_of(layers_with_hooks.prepared, setting))
    assert ours.counts == by_hand["top1"]
    assert ours.nll == pytest.approx(by_hand["nll"], abs=1e-5)
    record = json.loads((ended.directory() / "run.json").read_text())
    assert ours.loop == record["seconds_loop"] + record["seconds_writing"]


def test_masks_of_random_weights_make_a_difference(tmp_path: Path) -> None:
    file = prepare(Materials("digits", "vit_tiny_patch16_224", None, {"img_size": 32, "depth": 2}), 4, 1, 0, tmp_path)
    setting = read(file)
    assert setting.classes == 10
    assert setting.given == {"img_size": 32, "depth": 2}
    model = timm.create_model(setting.model, num_classes=10, **setting.options).eval()
    model.load_state_dict(load_file(setting.weights))
    images, labels = decoded(setting)
    with torch.inference_mode():
        plain = model(images)
        assert scored(plain, labels).right == len(labels) == 4
        attentions(model)[0].proj.weight[:, :64] = 0
        assert (model(images) - plain).abs().max() > 0.01 * plain.abs().max()


def test_the_best_batch_size_is_one_of_those_tried(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_batch, "SIZES", (1, 2))
    file = tmp_path / "setting.json"
    file.write_text(json.dumps(setting.__dict__))
    best_batch.main(str(file))
    said = json.loads(capsys.readouterr().out)
    assert said["batch"] in (1, 2)
