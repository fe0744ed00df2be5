"""Two gloo processes equal one. The worker is spawned, so it must be importable from this file alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy

PARTS = [(0, 9), (9, 9), (9, 30), (30, 37)]  # uneven, one without images


def draw() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 37, 7, generator=generator), torch.randint(7, (37,), generator=generator), torch.arange(37)


def score_share(rank: int, ranks: int, folder: str) -> None:
    """Score every `ranks`-th part and write what this rank says of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    logits, labels, groups = draw()
    metric = PairedAccuracy(2, 7, per_class=True)
    for start, stop in PARTS[rank::ranks]:
        metric.update(logits[:, start:stop], labels[start:stop], groups[start:stop])
    scores = metric.compute()._asdict()
    np.savez(Path(folder) / f"rank_{rank}.npz", **scores)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    spawn(score_share, args=(2, str(tmp_path)), nprocs=2)
    whole = PairedAccuracy(2, 7, per_class=True)
    whole.update(*draw())
    for name, expected in whole.compute()._asdict().items():
        for rank in (0, 1):
            with np.load(tmp_path / f"rank_{rank}.npz") as scores:
                tolerance = 1e-12 if expected.dtype.kind == "f" else 0
                np.testing.assert_allclose(scores[name], expected, rtol=tolerance, atol=tolerance, err_msg=name)
