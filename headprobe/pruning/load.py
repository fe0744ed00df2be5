"""`load_pruned`: a pruned model from its folder, as a PyTorch module with timm's interface."""

from pathlib import Path

from torch import nn

from headprobe.backbone.pruned.record import record_of
from headprobe.backbone.weights import ModelSource, create_backbone
from headprobe.errors import UsageError


def load_pruned(folder: str | Path) -> nn.Module:
    """Load a model that `headprobe prune` wrote, in evaluation mode, on the CPU.

    It is the class that timm builds, with `forward_features`, `forward_head`, `default_cfg` and `get_classifier`, and
    it can be exported (`torch.export`, ONNX).

    Args:
        folder: With `config.json` and `model.safetensors`.

    Raises:
        UsageError: It is no such folder; a file was changed, or is of another model; or a newer headprobe wrote it.
    """
    backbone = create_backbone(ModelSource(f"local-dir:{folder}"))
    if not record_of(backbone):
        raise UsageError(
            "load_pruned takes a folder that headprobe prune wrote; a model with all of its heads is loaded by "
            f"timm.create_model('local-dir:{folder}'), got {str(folder)!r}"
        )
    return backbone
