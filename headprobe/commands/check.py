"""`check`: proves, layer by layer, that masks take effect on a model."""

import json
import sys
from typing import Any, Literal

from headprobe.commands.parser import Parser
from headprobe.errors import RunError


def run(words: list[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        UsageError: There is no such model, it has no heads, or its attention cannot be masked.
        RunError: A proof failed.
    """
    parser = Parser(prog="headprobe check", description="Prove that head masks take effect on a model.")
    parser.add_argument(
        "name", type=str, help="timm's name of the model, hf-hub:OWNER/MODEL, local-dir:FOLDER, or a bundled one's."
    )
    parser.add_argument("--model.weights", type=str | None, default=None, help="Local safetensors file.")
    parser.add_argument(
        "--model.pretrained", type=bool, default=False, help="Fetch timm's pretrained weights; the proofs need none."
    )
    parser.add_argument("--model.num_classes", type=int | None, default=None, help="Classes of the classifier.")
    parser.add_argument("--model.options", type=dict[str, Any], default={}, help="Arguments of timm.create_model.")
    parser.add_argument(
        "--model.semantics",
        type=Literal["slot", "attention"],
        default="slot",
        help="What masking takes away where a head's slot holds more than what it attended to (docs/heads.md).",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(words)
    check_model(options.name, options.model, as_json=options.json)


def check_model(name: str, model: Any, *, as_json: bool) -> None:
    """Check the model `name` and print the report.

    Raises:
        RunError: A proof failed.
    """
    from headprobe.backbone.preparation import data_config
    from headprobe.backbone.proofs.check import check_backbone
    from headprobe.backbone.proofs.report import report_data, report_text
    from headprobe.backbone.weights import BUNDLED, ModelSource, create_backbone

    pretrained = model.pretrained or name in BUNDLED
    source = ModelSource(name, model.weights, pretrained, model.num_classes, dict(model.options))
    backbone = create_backbone(source)
    own_weights = pretrained or model.weights is not None
    size = data_config(backbone)["input_size"]
    report = check_backbone(backbone, size, name, model.semantics, own_weights)
    if as_json:
        sys.stdout.write(json.dumps(report_data(report), indent=1) + "\n")
    else:
        sys.stdout.write(report_text(report))
    if not report.passed:
        raise RunError(f"{len(report.failures)} proofs of {name!r} failed, the first is {report.failures[0]}")
