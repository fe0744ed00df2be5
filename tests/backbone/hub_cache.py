"""A hub cache with stand-ins for released weights: the hub's client reads them as it would without a network."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def offline(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let the hub's client use this cache and nothing else."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def snapshot(cache: Path, repository: str) -> Path:
    """Make and return the folder where the cache has a repository's files."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    files = folder / "snapshots" / COMMIT
    files.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return files


def released(cache: Path, name: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Put weights into the cache where timm looks for those of a name; random ones that no model starts with."""
    if state is None:
        torch.manual_seed(7)
        state = {key: value + 0.01 for key, value in timm.create_model(name).state_dict().items()}
    save_file(state, snapshot(cache, timm.get_pretrained_cfg(name).hf_hub_id) / "model.safetensors")
    return state
