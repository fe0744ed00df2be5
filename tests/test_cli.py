"""The command line: every wrong request ends in one message and its exit code; what it writes can be replayed."""

import errno
import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headprobe.cli import main
from headprobe.data.digits import __file__ as digits
from headprobe.errors import HeadprobeWarning
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe
from tests.cli_runs import QUICK, Ended, command, only_message
from tests.data.parquet_sets import png, table, write_files, write_table

WEIGHTS = Path(digits).with_name("digits_vit.safetensors")


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Run a YAML list of specs."""
    folder = tmp_path_factory.mktemp("listed")
    (folder / "specs.yaml").write_text("mask_spec: [each:layer, head:3.1]\ndata: {max_images: 40, num_workers: 0}\n")
    return command(folder, "test", "--config", "specs.yaml")


# -- wrong requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask-spec", "layer:12"], "digits_vit has no layer 12: its layers are 0 to 5"),
        (["--mask-spec", "head:3.4"], "digits_vit has no head 3.4: layer 3 has heads 0 to 3"),
        (["--mask-spec", "layer:3,"], "expected a layer number here"),
        (["--mask-spec", "head:3"], "write head:3.1 for head 1 of layer 3"),
        (["--mask-spec", ""], "the mask spec is empty"),
        (["--mask-spec", "layer:1", "--mask-spec", "layer:2"], "--mask-spec stands more than once"),
        (["--ablation", "mean", "--ablation", "zero"], "--ablation stands more than once: join several with a comma"),
        (["--mask-spec", "[]"], "the list of mask specs is empty"),
        (["--bogus", "3"], "unrecognized arguments: --bogus 3"),
        (["--data.batchsize", "3"], "did you mean --data.batch_size"),
        (["--model.name", "deit_tiny_patch16_22"], "did you mean deit_tiny_patch16_224"),
        (["--model.name", "resnet18", "--model.pretrained", "false"], "'resnet18' has no attention heads"),
        (["--model.name", "shvit_s1", "--model.pretrained", "false"], "has attention with a single head by design"),
        (["--model.weights", "nowhere.safetensors"], "'nowhere.safetensors' does not exist"),
        (["--data.path", "/nowhere/at/all"], "--data.path names no file or folder here"),
        (["--data.batch_size", "0"], "--data.batch_size must be at least 1, got 0"),
        (["--data.batch_size", "x"], "--data.batch_size: Expected a <class 'int'>. Got value: x"),
        (["--config", "nowhere.yaml"], "File does not exist"),
        (["--trainer.accelerator", "nonsense"], "Lightning cannot use these --trainer options"),
        (["--trainer.limit_test_batches", "3"], "use --data.max_images instead"),
        (["--trainer.limit_test_batches", "1"], "use --data.max_images instead, got 1"),
        (["--trainer.limit_test_batches", "0.5"], "use --data.max_images instead, got 0.5"),
        (["--trainer.fast_dev_run", "true"], "--trainer.fast_dev_run counts batches"),
        (["--trainer.fast_dev_run", "5"], "use --data.max_images instead, got 5"),
        (["--trainer.limit_val_batches", "2"], "use --data.calibration_images instead, got 2"),
        (["--trainer.limit_val_batches", "0"], "use --data.calibration_images instead, got 0"),
        (["--trainer.overfit_batches", "1"], "--trainer.overfit_batches counts batches"),
        (["--model.row_budget", "0"], "row_budget must be 1 or more, got 0"),
    ],
)
def test_wrong_options_are_one_message_and_code_2_and_write_nothing(
    tmp_path: Path, words: list[str], message: str
) -> None:
    ended = command(tmp_path, "test", *QUICK, *words)
    assert ended.code == 2
    assert message in only_message(ended)
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


MISSING = """
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler

class Board(CSVLogger):
    def __init__(self, save_dir: str = "x") -> None:
        raise ModuleNotFoundError("Requirement 'board>=1.0' not met. HINT: Try running `pip install board`")

class Profile(SimpleProfiler):
    def __init__(self) -> None:
        raise RuntimeError("the profiler's own reason,\\nin two lines")

class Stop(Callback):
    def __init__(self, after: int) -> None:
        raise KeyError("after")
"""


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (
            "logger: missing.Board",
            "--trainer.logger names a class that cannot be built: Requirement 'board>=1.0' not met. HINT: Try running "
            "`pip install board`, got Board",
        ),
        (
            "logger: [{class_path: CSVLogger, init_args: {save_dir: x}}, missing.Board]",
            "Requirement 'board>=1.0' not met",
        ),
        ("profiler: missing.Profile", "--trainer.profiler names a class that cannot be built: the profiler's own"),
        (
            "callbacks: [HeadAttention, {class_path: missing.Stop, init_args: {after: 3}}]",
            "--trainer.callbacks names a class that cannot be built: 'after', got Stop",
        ),
        ("callbacks: [missing.Stop]", "--trainer.callbacks: the following arguments are required: after"),
        ("logger: Nonsense", "--trainer.logger: expected a Logger by its class's name or import path, true or false"),
        ("precision: 17", "bf16-mixed, 32-true, 64-true, bf16 or null, got 17"),
        ("max_epochs: few", "--trainer.max_epochs: expected a whole number or null, got few"),
    ],
)
def test_a_class_or_value_that_does_not_do_is_one_line_with_its_option(
    tmp_path: Path, yaml: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "missing.py").write_text(MISSING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "missing", raising=False)
    (tmp_path / "run.yaml").write_text(f"trainer:\n  {yaml}\n")
    ended = command(tmp_path, "test", *QUICK, "--config", "run.yaml")
    assert ended.code == 2
    assert message in only_message(ended)
    assert len(ended.err.splitlines()) == 1
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("mask_spec: 3:5", "YAML reads a bare 3:5 as 185"),
        ("mask_spec: 3.5", "YAML reads a bare 3.5 as a number"),
        ("ablation:\nseed_everything: 1", "ablation: in a config file must have a value"),
        ("mask_spec:\nseed_everything: 1", "mask_spec: in a config file must have a value"),
        ("data:\nmask_spec: none", "data: in a config file must hold options or be left out"),
        ("data: {batch_size: null}", "data.batch_size: in a config file must have a value"),
        ("mask_spec: [layer:3, 3:5]", "YAML reads a bare 3:5 as 185"),
        ("model: {mask_spec: layer:3}", "does not accept option 'model.mask_spec'; did you mean --mask-spec?"),
        ("mask_specs: layer:3", "does not accept option 'mask_specs'; did you mean --mask-spec?"),
    ],
)
def test_wrong_config_files_are_one_message_and_code_2(tmp_path: Path, yaml: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(yaml + "\n")
    ended = command(tmp_path, "test", *QUICK, "--config", "run.yaml")
    assert ended.code == 2
    assert message in only_message(ended)


def test_the_caret_stands_under_the_culprit(tmp_path: Path) -> None:
    spec, caret = only_message(command(tmp_path, "test", "--mask-spec", "layer:3,x")).splitlines()[-2:]
    assert spec[caret.index("^")] == "x"


@pytest.mark.parametrize("words", [["tset"], ["--mask-spec", "layer:3"]])
def test_the_first_word_must_be_a_command(tmp_path: Path, words: list[str]) -> None:
    ended = command(tmp_path, *words)
    assert ended.code == 2
    assert "(study, report, compare, test, fit, prune, masks, check, models, status, convert)" in only_message(ended)


@pytest.mark.parametrize("spec", ["layer:0", "random:1-20:0-400"])
def test_a_reader_that_has_enough_ends_a_command_without_a_word(tmp_path: Path, spec: str) -> None:
    words = [sys.executable, "-m", "headprobe", "masks", spec]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    ended = command(tmp_path, "test", *QUICK, "--model.weights", "weights.pth")
    assert ended.code == 2
    assert "not readable as safetensors" in only_message(ended)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file(load_file(WEIGHTS), tmp_path / "bare.safetensors")  # without the recipe in the file's metadata
    ended = command(tmp_path, "test", *QUICK, "--model.name", "digits_swin", "--model.weights", "bare.safetensors")
    assert ended.code == 2
    assert "belong to another model" in only_message(ended)


def test_classes_that_do_not_match_are_refused(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK, "--model.name", "test_vit", "--model.pretrained", "false")
    assert ended.code == 2
    assert "the dataset has 10 classes and the model 1000" in only_message(ended)


def test_a_dataset_without_labels_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "unlabelled", table([png(n) for n in range(4)], [-1] * 4))
    ended = command(tmp_path, "test", *QUICK, "--data.path", "unlabelled")
    assert ended.code == 2
    assert "no labels in this split" in only_message(ended)


# -- failed runs -------------------------------------------------------------------------------------------------------


def test_a_truncated_shard_is_named_with_code_1(tmp_path: Path) -> None:
    shard = sorted((write_files(tmp_path / "set", [[8], [8]]) / "data").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:300])
    ended = command(tmp_path, "test", *QUICK, "--data.path", "set")
    assert ended.code == 1
    assert "validation-00001-of-00002.parquet" in only_message(ended)


def test_corrupt_images_are_listed_and_the_run_finishes_with_code_1(tmp_path: Path) -> None:
    cells = [png(n) for n in range(20)]
    cells[7], cells[13] = b"no image", cells[13][:60]
    write_table(tmp_path / "set", table(cells, [n % 10 for n in range(20)]))
    ended = command(tmp_path, "test", *QUICK, "--data.path", "set", "--mask-spec", "layer:3")
    assert ended.code == 1
    assert "2 images could not be used" in only_message(ended)
    listed = (ended.directory() / "bad_images.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in listed] == ["row", "7", "13"]
    assert [row["images"] for row in ended.rows()] == ["18", "18"]
    assert json.loads((ended.directory() / "run.json").read_text())["status"] == "failed"


def test_a_full_disk_is_one_message_and_keeps_finished_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size and Path(f"/proc/self/fd/{descriptor}").resolve().name.startswith("masks.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    ended = command(tmp_path, "test", *QUICK, "--mask-spec", "layer:3")
    assert ended.code == 1
    assert "masks.json' (No space left on device); make room" in only_message(ended)
    assert len(ended.rows()) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_directory_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs").touch()
    ended = command(tmp_path, "test", *QUICK)
    assert ended.code == 1
    assert "lightning_logs' (File exists)" in only_message(ended)


def test_an_unreachable_hub_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    ended = command(tmp_path, "test", *QUICK, "--data.path", "nobody/nothing", "--dry-run")
    assert ended.code == 1
    assert "nobody/nothing" in only_message(ended)


# -- what a run does ---------------------------------------------------------------------------------------------------


def test_none_changes_no_bit_against_the_plain_timm_model() -> None:
    with safe_open(WEIGHTS, framework="pt") as file:
        recipe = json.loads(file.metadata()["headprobe"])
    plain = timm.create_model(recipe["name"], num_classes=recipe["num_classes"], **recipe["options"]).eval()
    plain.load_state_dict(load_file(WEIGHTS))
    probe = HeadProbe()
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        probe.choose_masks([MaskSpec("none")])
        probe.plan_passes(batch_size=8)
        assert torch.equal(probe.masked_logits(images)[0], plain(probe.normalised(images)))


def test_without_a_spec_only_the_baseline_is_scored(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK)
    assert ended.code == 0
    assert [row["mask"] for row in ended.rows()] == ["none"]


def test_all_heads_may_be_masked(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK, "--mask-spec", "all")
    assert ended.code == 0
    assert [(row["mask"], row["heads_masked"]) for row in ended.rows()] == [("none", "0"), ("all", "24")]


def test_a_yaml_list_is_the_union_of_its_specs(listed: Ended) -> None:
    assert listed.code == 0
    assert [row["mask"] for row in listed.rows()] == ["none", *(f"layer:{n}" for n in range(6)), "head:3.1"]


def test_the_saved_config_replays_to_the_same_bytes(listed: Ended) -> None:
    again = command(listed.folder, "test", "--config", str(listed.directory() / "config.yaml"))
    assert again.code == 0
    assert (listed.directory(1) / "masks.csv").read_bytes() == (listed.directory() / "masks.csv").read_bytes()


def test_an_option_overrides_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mask_spec: [each:layer, head:3.1]\n")
    ended = command(tmp_path, "test", "--config", "run.yaml", *QUICK, "--mask-spec", "layer:2")
    assert [row["mask"] for row in ended.rows()] == ["none", "layer:2"]


def test_results_go_to_the_directory_asked_for(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK, "--trainer.default_root_dir", "there")
    assert ended.code == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there" / "lightning_logs" / "version_0" / "masks.csv").is_file()


def test_fit_writes_weights_that_test_can_score(tmp_path: Path) -> None:
    config = Path(__file__).parents[1] / "configs" / "digits_vit.yaml"
    fitted = command(
        tmp_path, "fit", "--config", str(config), "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu",
        "--model.options.depth", "2", "--data.num_workers", "0",
    )  # fmt: skip
    assert fitted.code == 0, fitted.err
    weights = fitted.directory() / "model.safetensors"
    scored = command(
        tmp_path, "test", *QUICK, "--model.name", "vit_tiny_patch16_224", "--model.weights", str(weights),
        "--mask-spec", "each:layer",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    assert [row["mask"] for row in scored.rows(1)] == ["none", "layer:0", "layer:1"]


@pytest.mark.parametrize("words", [["--mask-spec", "layer:3"], ["--dry-run"], ["--records"]])
def test_fit_refuses_the_options_of_test(tmp_path: Path, words: list[str]) -> None:
    ended = command(tmp_path, "fit", *words)
    assert ended.code == 2
    assert "belong to test" in only_message(ended)


# -- start-up and noise, in processes of their own ---------------------------------------------------------------------


def test_help_loads_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from headprobe.cli import main; assert main(['--help']) == 0; "
        "print(sorted({'torch', 'lightning', 'timm', 'numpy', 'jsonargparse'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: headprobe COMMAND")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_good_run_writes_nothing_but_its_own_lines_to_stderr(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headprobe", "test", "--mask-spec", "layer:3", *QUICK],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert all(line.startswith("headprobe: scored ") for line in done.stderr.splitlines())
    assert "layer:3" in done.stdout


@pytest.mark.parametrize("content", ["mask_spec: layer:1", "test: {mask_spec: layer:1}"])
def test_a_config_that_would_replace_the_masks_asked_for_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "own.yaml").write_text(content + "\n")
    ended = command(tmp_path, "test", "--mask-spec", "layer:3", "--config", "own.yaml", *QUICK)
    assert ended.code == 2
    assert "put --mask-spec last" in only_message(ended)


def test_a_config_that_would_replace_the_ablation_asked_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("ablation: zero\n")
    ended = command(tmp_path, "test", "--mask-spec", "layer:3", "--ablation", "mean", "--config", "own.yaml", *QUICK)
    assert ended.code == 2
    assert "put --ablation last" in only_message(ended)


def test_a_config_without_masks_may_stand_behind_them(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("data: {batch_size: 16}\n")
    ended = command(tmp_path, "test", "--mask-spec", "layer:3", "--config=own.yaml", *QUICK)
    assert ended.code == 0
    assert [row["mask"] for row in ended.rows()] == ["none", "layer:3"]


def test_machines_that_nothing_is_known_of_are_not_waited_for(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK, "--trainer.num_nodes", "2", "--trainer.strategy", "ddp")
    assert ended.code == 2
    assert "set MASTER_ADDR, MASTER_PORT, NODE_RANK on each" in only_message(ended)


def test_an_interrupt_that_another_error_hides_is_still_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("pop from empty mode stack")  # as PyTorch's clean-up does

    monkeypatch.setattr(HeadProbe, "masked_logits", logits)
    monkeypatch.setattr(HeadProbe, "logits_of", logits)
    ended = command(tmp_path, "test", *QUICK, "--mask-spec", "layer:3")
    assert ended.code == 130
    assert only_message(ended).startswith("interrupted; ")
    assert json.loads((ended.directory() / "run.json").read_text())["status"] == "interrupted"


def test_a_warning_of_headprobe_is_one_line_without_a_path(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(*_: object, **__: object) -> None:
        warnings.warn("going on with 4", HeadprobeWarning, stacklevel=1)

    monkeypatch.setattr("headprobe.cli._run", warned)
    assert main(["masks"]) == 0
    assert capsys.readouterr().err == "headprobe: going on with 4\n"


@pytest.mark.parametrize("given", [False, True])
def test_only_a_process_of_its_own_leaves_its_imports_out_of_the_search_for_garbage(given: bool) -> None:
    """A caller's objects are theirs: freezing them would keep their garbage for good."""
    code = f"""
import gc, json, sys
words = ["status", "nowhere"]
sys.argv = ["headprobe", *words]
from headprobe.cli import main
searches = []
gc.callbacks.append(lambda phase, _: searches.append(phase) if gc.get_freeze_count() == 0 else None)
code = main(words) if {given} else main()
print(json.dumps([code, len(searches), gc.get_freeze_count(), gc.isenabled()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    exit_code, searches, frozen, enabled = json.loads(done.stdout)

    assert exit_code == 2
    assert enabled
    assert (searches > 0, frozen > 10_000) == (given, not given)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
@pytest.mark.parametrize(
    ("words", "variables", "kept"),
    [("", {}, True), ("['status', 'x']", {}, False), ("", {"MALLOC_ARENA_TEST": "8"}, False)],
)
def test_a_process_of_its_own_keeps_the_memory_of_large_tensors_unless_its_user_has_settings(
    words: str, variables: dict[str, str], kept: bool
) -> None:
    code = f"""
import ctypes, resource, sys
from headprobe.cli import main
sys.argv = ["headprobe", "status", "x"]
main({words})
libc, size = ctypes.CDLL(None), 24 << 20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def layer():
    blocks = [libc.malloc(size) for _ in range(4)]
    for block in blocks:
        libc.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
layer()
layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=others | variables
    )
    pages = 4 * (24 << 20) // os.sysconf("SC_PAGESIZE")
    assert (int(done.stdout) < pages / 10) is kept
