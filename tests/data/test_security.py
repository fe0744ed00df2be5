"""A dataset is somebody else's: nothing of it is run, nothing outside of it is read, and no token is left behind."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headprobe.data.sources.source import safe_text
from headprobe.errors import UsageError
from headprobe.text import safe_command, without_secrets
from tests.cli_runs import Ended
from tests.data.hub_runs import TOKEN, environment, read_all
from tests.data.mock_hub import Fault, MockHub, running
from tests.data.parquet_sets import bound, features, numbers, png, write_files

PACKAGE = Path(__file__).parents[2] / "headprobe"
RUNS_CODE = (
    # UnpicklingError is what torch.load(weights_only=True) raises
    r"^\s*(import|from)\s+(pickle|dill|cloudpickle|joblib|shelve|marshal)\b(?! import UnpicklingError\n)",
    r"\.Unpickler|\bpickle\.load",
    r"trust_remote_code",
    r"allow_pickle\s*=\s*(?!False)",
    r"torch\.load\((?![^)]*weights_only\s*=\s*True)",
    r"yaml\.(load|unsafe_load|full_load)\w*\(",
    r"from (torch|yaml|numpy) import (.*\b)?load\b",
)
README = '---\nconfigs:\n- config_name: default\n  data_files:\n  - split: validation\n    path: "{}"\n---\n'
COMMAND = """
import sys
from headprobe.data.sources import retries
retries.READING = retries.OPENING = 1.0
from headprobe.cli import main
sys.argv = ["headprobe", *sys.argv[1:]]
sys.exit(main())
"""
COMMANDS = """
import json, sys
from pathlib import Path
from headprobe.data.sources import retries
retries.READING = retries.OPENING = 1.0
from tests.cli_runs import command
for folder, words in json.load(sys.stdin):
    Path(folder).mkdir()
    ended = command(Path(folder), *words)
    print(json.dumps([ended.code, ended.out, ended.err]))
"""


@pytest.mark.parametrize("pattern", RUNS_CODE)
def test_no_source_of_the_package_can_run_what_a_file_says(pattern: str) -> None:
    found = [
        file.name
        for file in PACKAGE.rglob("*.py")
        if re.search(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert found == []


def script(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()\n"


def test_a_script_in_a_local_dataset_is_not_run(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "set", [[3]])
    (folder / "set.py").write_text(script(tmp_path / "ran"), encoding="utf-8")
    with pytest.raises(UsageError, match="script"):
        bound(folder)
    assert not (tmp_path / "ran").exists()


def secret_and_set(folder: Path) -> tuple[Path, Path]:
    """Write two datasets beside each other, the second of which will name the first as its own."""
    secret = write_files(folder / "secret", [[3]]) / "data" / "validation-00000-of-00001.parquet"
    return secret, write_files(folder / "set", [[2]])


@pytest.mark.parametrize("how", ["parent", "winding", "absolute", "glob", "file address"])
def test_files_outside_of_a_local_dataset_are_refused(tmp_path: Path, how: str) -> None:
    secret, folder = secret_and_set(tmp_path)
    named = {
        "parent": f"../secret/data/{secret.name}",
        "winding": f"data/../../secret/data/{secret.name}",
        "absolute": str(secret),
        "glob": str(secret.parent / "*.parquet"),
        "file address": f"file://{secret}",
    }[how]
    (folder / "README.md").write_text(README.format(named), encoding="utf-8")
    with pytest.raises(UsageError, match="asks for files outside of it"):
        bound(folder)


def test_a_folder_outside_of_a_local_dataset_is_refused(tmp_path: Path) -> None:
    _, folder = secret_and_set(tmp_path)
    text = "---\nconfigs:\n- config_name: default\n  data_dir: ../secret\n---\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="asks for files outside of it"):
        bound(folder)


def test_files_inside_that_are_named_in_the_readme_are_read(tmp_path: Path) -> None:
    _, folder = secret_and_set(tmp_path)
    (folder / "README.md").write_text(README.format("data/*.parquet"), encoding="utf-8")
    assert numbers(bound(folder).test_dataloader()) == [0, 1]


def test_of_a_hub_dataset_no_script_is_run_and_no_file_outside_is_read(tmp_path: Path) -> None:
    secret, folder = secret_and_set(tmp_path)
    scripts = write_files(tmp_path / "scripts", [[3]])
    for name in ("scripted", "scripts", "default"):
        (scripts / f"{name}.py").write_text(script(tmp_path / "ran"), encoding="utf-8")
    with running(folder) as hub:
        hub.folders["scripted"] = scripts
        named = {
            "absolute": str(secret),
            "parent": f"../other/data/{secret.name}",
            "file": f"file://{secret}",
            "stranger": f"hf://datasets/owner/other/data/{secret.name}",
        }
        hub.folders["other"] = secret.parents[1]
        for name, place in named.items():
            hub.folders[name] = write_files(tmp_path / name, [[2]])
            (hub.folders[name] / "README.md").write_text(README.format(place), encoding="utf-8")
        asked = [{"path": f"owner/{name}"} for name in (*named, "scripted")]  # one process: its start takes seconds
        *answers, scripted = read_all(tmp_path / "home", hub.address, asked)
        reads = [line for line in hub.requests if "/owner/other/resolve" in line]
    for name, answer in zip(named, answers, strict=True):
        (failure,) = answer.failures
        # the hub's file system knows no parents: there it finds nothing
        assert ("Unable to find" if name == "parent" else "asks for files outside of it") in failure
        assert f"owner/{name}" in failure
        assert answer.numbers == []
    assert reads == []
    (failure,) = scripted.failures
    assert "owner/scripted is made by a script, which is never run" in failure
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("how", ["absolute", "relative", "file", "http", "hf"])
def test_a_path_in_an_image_column_is_never_followed(tmp_path: Path, how: str) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "one.png").write_bytes(png(1))
    with running(served) as hub:
        named = {
            "absolute": str(served / "one.png"),
            "relative": "../served/one.png",
            "file": f"file://{served / 'one.png'}",
            "http": f"{hub.address}/datasets/owner/set/resolve/main/one.png",
            "hf": "hf://datasets/owner/set/one.png",
        }[how]
        images = [{"bytes": png(0), "path": "good.png"}, {"bytes": None, "path": named}]
        rows = pa.table({"image": images, "label": [0, 1]}, schema=features().arrow_schema)
        (tmp_path / "set").mkdir()
        pq.write_table(rows, tmp_path / "set" / "validation.parquet")
        batches = list(bound(tmp_path / "set").test_dataloader())
        assert hub.requests == []
    assert numbers(batches) == [0]
    (bad,) = [bad for batch in batches for bad in batch.bad]
    assert bad.row == 1


def run(folder: Path, hub: MockHub, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line in a process of its own, with a token planted."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        cwd=folder,
        env=environment(folder / "home", hub.address, OMP_NUM_THREADS="1"),
        capture_output=True,
        timeout=300,
        check=False,
    )


class Planted(NamedTuple):
    """Commands that ran with a token planted, in folders of their own: how they ended, and what the hub was sent."""

    folder: Path
    ended: dict[str, Ended]
    said: dict[str, bytes]
    tokens: set[str]


ON_THE_COMMAND_LINE = {
    "account": f"https://user:{TOKEN}@host/set",
    "signature": f"https://host/set?X-Amz-Signature={TOKEN}",
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Run commands one after the other in one process, which takes seconds to start."""
    folder = tmp_path_factory.mktemp("planted")
    words = ("--mask-spec", "layer:0", "--data.num_workers", "1", "--trainer.accelerator", "cpu")
    paths = {name: f"owner/{name}" for name in ("set", "closed", "refused")} | ON_THE_COMMAND_LINE
    asked = [(str(folder / name), ["test", "--data.path", path, *words]) for name, path in paths.items()]
    with running(write_files(tmp_path_factory.mktemp("served"), [[5, 3], [4, 2]])) as hub:
        hub.faults = {"refused": [Fault("validation-00001", 403)], "closed": [Fault("/api/", 401)]}
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS],
            input=json.dumps(asked).encode(),
            env=environment(folder / "home", hub.address, OMP_NUM_THREADS="1"),
            capture_output=True,
            timeout=300,
            check=False,
        )
        tokens = set(hub.tokens)
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.splitlines()]
    ended = {name: Ended(code, out, err, folder / name) for name, (code, out, err) in zip(paths, found, strict=True)}
    return Planted(folder, ended, {"stdout": done.stdout, "stderr": done.stderr}, tokens)


def traces(planted: Planted) -> list[str]:
    """Where the planted token, or what is left of it when split in two, is found in outputs and files."""
    texts = dict(planted.said)
    for file in planted.folder.rglob("*"):
        if file.is_file():
            texts[str(file.relative_to(planted.folder))] = file.read_bytes()
    return [name for name, text in texts.items() if TOKEN.encode() in text or TOKEN[12:].encode() in text]


@pytest.mark.slow
def test_a_token_leaves_no_trace_in_a_run(planted: Planted) -> None:
    ended = planted.ended
    assert ended["set"].code == 0, ended["set"].err
    assert ended["closed"].code != 0
    assert ended["refused"].code == 1, ended["refused"].err
    assert all("Traceback" not in one.err for one in ended.values())
    assert traces(planted) == []
    assert (ended["set"].directory() / "run.json").is_file()
    assert planted.tokens == {f"Bearer {TOKEN}"}  # it was sent, and the errors repeated it


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_THE_COMMAND_LINE)
def test_a_token_on_the_command_line_leaves_no_trace(planted: Planted, name: str) -> None:
    assert planted.ended[name].code == 2
    assert traces(planted) == []


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"https://user:{TOKEN}@host/a.parquet", TOKEN),
        ("https://user:passw0rd@host/a.parquet", "passw0rd"),
        ("https://cdn.example/a?X-Amz-Signature=0123abcd&x=1", "0123abcd"),
        (f"Authorization: Bearer {TOKEN}", TOKEN),
        ("{'Authorization': 'Bearer abc.def-123'}", "abc.def-123"),
        ("password=s3cret", "s3cret"),
        ("?token=abcdef123", "abcdef123"),
    ],
)
def test_what_opens_an_account_is_cut_out(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in without_secrets(text)
    assert secret not in safe_command(["headprobe", "test", "--data.path", text])
    assert secret not in safe_text(OSError(text))


def test_a_token_of_any_form_is_cut_out_if_it_is_the_one_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "NoSuchForm-123")
    assert without_secrets("rejected NoSuchForm-123.") == "rejected ...."


@pytest.mark.parametrize(
    "words",
    [
        ["headprobe", "test", "--data.path", "data/validation-0000?.parquet", "--mask-spec", "each:layer"],
        ["headprobe", "test", "--model.name", "hf-hub:owner/name", "--data.path", "owner/hf_set"],
    ],
)
def test_a_command_without_secrets_stays_as_it_is(words: list[str]) -> None:
    assert shlex.split(safe_command(words)) == words
