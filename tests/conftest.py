"""What several test folders share: a tiny ViT and Swin with perturbed weights, and where real data lies."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import timm
import torch
from torch import nn

from tests.cli_runs import draw_nothing

# No claim is about time, and on busy cores any example may take long.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Share the test files between two processes; what is named by file or test runs in this one, which starts sooner.

    Two and not one per core: these tests start up to four processes of their own, and a worker grows to gigabytes.
    """
    named = [Path(word.partition("::")[0]) for word in config.args]
    cores = os.cpu_count() or 1
    return 0 if cores < 2 or all(path.is_file() for path in named) else 2


def pytest_configure(config: pytest.Config) -> None:
    """Let no plugin put the files with the most tests first: see below."""
    config.option.loadscopereorder = False  # pytest-xdist's


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with the most slow tests first, so that both processes end together, on files that take little."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Give each worker one thread: on shared cores the threads of tiny models wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before a worker imports torch


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to every parameter: zero-initialised projections, scales and bias tables would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


TINY: dict[str, tuple[str, dict[str, object]]] = {
    "vit": ("test_vit", {}),
    "vit_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "beit": ("beit_base_patch16_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 56, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "eva_inner_norm": ("eva02_base_patch16_clip_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "clip": ("vit_base_patch16_clip_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64, "embed_dim": 48, "num_heads": 3, "depth": 3}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "swin_v2": (
        "swinv2_tiny_window8_256",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "swin_v2_cr": (
        "swinv2_cr_tiny_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    ),
}
"""Smallest representative of each supported attention class: timm name and options."""


def tiny(kind: str, classes: int = 10, **changed: Any) -> Any:
    """Build one of the tiny models with perturbed weights, its options changed by `changed`."""
    name, options = TINY[kind]
    torch.manual_seed(0)
    return perturbed(timm.create_model(name, num_classes=classes, **{**options, **changed}))


@pytest.fixture(params=sorted(TINY))
def tiny_kind(request: pytest.FixtureRequest) -> str:
    """Run a test on every kind of tiny model."""
    return str(request.param)


@pytest.fixture
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pytest's own arguments from Lightning's command line."""
    monkeypatch.setattr("sys.argv", ["headprobe"])


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Draw nothing at the end of the runs of a file whose tests look at no figure."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        yield


@pytest.fixture(scope="session")
def sample_images() -> Path:
    """Give the folder of 500 real ImageNet images, or skip."""
    return _shared("imagenet_sample")


@pytest.fixture(scope="session")
def deit_tiny_weights() -> Path:
    """Give the published DeiT-Ti weights, or skip."""
    return _shared("deit_tiny/model.safetensors")


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/{name} is absent: real weights and images are not part of the repository")
    return path
