"""Starts runs of several processes in a second or two: forked from a server that has torch and Lightning loaded.

Every process of a run is started by us, as on a cluster, and not by Lightning: with the rank in its environment. These
runs draw no figures unless a test asks for them.
"""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import headprobe
from tests.cli_runs import Ended, draw_nothing

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("headprobe.commands.test_and_fit", "headprobe.data.datamodule", "headprobe.data.sources.streamed"),
        *("timm", "datasets", "torch.utils.tensorboard", "tests.forked"),
    ]
)

DIGITS = Path(headprobe.__file__).with_name("data") / "digits"


@dataclass
class Running:
    """A run under way: its processes in the order of their ranks, and the folder they work in."""

    processes: Sequence[BaseProcess]
    folder: Path
    log: str = ""

    def kill(self) -> None:
        """Kill every process and what it has started, at once and without warning."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join(10)

    def wait(self, seconds: float = 120) -> Ended:
        """Wait for the end of all processes; the exit code and the output are those of the first."""
        deadline = time.monotonic() + seconds
        first, *others = self.processes
        first.join(seconds)
        for process in others:  # a cluster ends the others when one has failed before it knew of them
            process.join(max(0.1, deadline - time.monotonic()) if first.exitcode == 0 else 10)
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        if late and first.exitcode in (0, None):
            pytest.fail(f"processes {late} did not end within {seconds} seconds:\n{self.text('err', 0)}")
        code = first.exitcode
        return Ended(-1 if code is None else code, self.text("out", 0), self.text("err", 0), self.folder)

    def text(self, stream: str, rank: int) -> str:
        """Return what a process has written to `out` or `err`."""
        file = self.folder / f"{self.log}{stream}.{rank}"
        return file.read_text() if file.exists() else ""


def start(folder: Path, *words: str, processes: int = 1, log: str = "", **cluster: Any) -> Running:
    """Start `headprobe` with these words in `folder`, as many processes.

    Args:
        folder: Where they work; a second node works in the folder "node 1" beside it.
        words: The command.
        processes: How many.
        log: Begins the names of the files that hold what they print.
        cluster: `nodes=2` makes each process a node of its own, `slurm=True` gives them SLURM's variables,
            `environment` further ones, `file_size` limits the files that they may write, in bytes, and `pictures=True`
            lets them draw figures.
    """
    folder.mkdir(exist_ok=True, parents=True)
    nodes = cluster.get("nodes", 1)
    if processes > 1:
        words = (*words, "--trainer.devices", str(processes // nodes), "--trainer.strategy", "ddp")
    if nodes > 1:
        words = (*words, "--trainer.num_nodes", str(nodes))
    port, started = str(free_port()), []
    for rank in range(processes):
        # one process is what the command line starts without any launcher
        variables = _variables(rank, processes, port, nodes, cluster.get("slurm", False)) if processes > 1 else {}
        place = folder if nodes == 1 or rank == 0 else folder.with_name(f"node {rank}")
        variables |= cluster.get("environment", {})
        more = (cluster.get("file_size"), cluster.get("pictures", False))
        given = (str(place), words, variables, f"{log}{{}}.{rank}", *more)
        process = _SERVER.Process(target=_work, args=given)
        process.start()
        started.append(process)
    return Running(started, folder, log)


def _variables(rank: int, processes: int, port: str, nodes: int, slurm: bool) -> dict[str, str]:
    """Return what a launcher puts into the environment of one process."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    if slurm:
        numbers = {"NTASKS": processes, "NTASKS_PER_NODE": processes, "PROCID": rank, "LOCALID": rank, "NODEID": 0}
        names = {"JOB_ID": "7", "JOB_NAME": "probe", "NODELIST": "127.0.0.1", "NNODES": "1"}
        return variables | {f"SLURM_{name}": str(value) for name, value in {**numbers, **names}.items()}
    if nodes > 1:
        return variables | {"LOCAL_RANK": "0", "NODE_RANK": str(rank)}
    return variables | {"LOCAL_RANK": str(rank)}


def run(folder: Path, *words: str, processes: int = 1, **cluster: Any) -> Ended:
    """Start `headprobe` and wait for its end."""
    return start(folder, *words, processes=processes, **cluster).wait()


def resumed_after_a_kill(folder: Path, stores: int, *words: str) -> tuple[Ended, int]:
    """Kill two processes once so many stores hold finished units, a store a stage; go on with one process.

    Returns:
        How it ended, and the number of its run.
    """
    running, deadline = start(folder, *words, processes=2), time.monotonic() + 60
    while time.monotonic() < deadline:
        if sum(any(own.glob("units-*.npz")) for own in folder.glob("lightning_logs/units/*")) == stores:
            break
        time.sleep(0.01)
    running.kill()
    assert len(list(folder.glob("lightning_logs/units/*/store.json"))) == stores
    number = len(list(folder.glob("lightning_logs/version_*")))
    ended = run(folder, *words)
    assert ended.code == 0, ended.err
    assert "Resuming: " in ended.out or "All of it was scored before" in ended.out
    return ended, number


def _work(
    folder: str, words: Sequence[str], environment: Mapping[str, str], log: str, file_size: int | None, pictures: bool
) -> None:
    os.setpgid(0, 0)  # so that worker processes can be killed together with it
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where pytest itself was started to ignore it too
    for stream, number in (("out", 1), ("err", 2)):
        file = os.open(log.format(stream), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # a server's children would start their workers by servers
    sys.argv = ["headprobe", *words]
    sys.path.insert(0, folder)  # as of `python -m headprobe`
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    import torch

    from headprobe.cli import main

    torch.set_num_threads(1)
    if not pictures:
        draw_nothing(pytest.MonkeyPatch())
    sys.exit(main())


def free_port() -> int:
    """Return a port of the loopback interface that no process uses."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def digits(folder: Path, images: int, files: int) -> Path:
    """Write the first bundled test images into Parquet files of about equal size, one row group each."""
    table = pq.read_table(next(iter(sorted(DIGITS.glob("**/test*.parquet"))))).slice(0, images)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        first, stop = (images * end // files for end in (number, number + 1))
        pq.write_table(table.slice(first, stop - first), folder / f"validation-{number:05}-of-{files:05}.parquet")
    return folder
