"""What the moments of head outputs are taken over: the options a user chooses, checked."""

from typing import Literal, NamedTuple, get_args

import torch

from headprobe.errors import UsageError
from headprobe.metrics.head_blocks import Scope
from headprobe.metrics.layer_samples import Sampling

Precision = Literal["float64", "float32"]

MAX_GROUPS = 16  # of images, for the jackknife: each keeps moments of its own


class MomentOptions(NamedTuple):
    """What is summed. Only moments of equal options and layers can be merged."""

    scope: Scope = "within"  #: heads compared with each other: of a layer, of the model, or of chosen pairs of layers
    sampling: Sampling = "tokens"  #: a sample is any token, a patch token, the class token, or an image's mean token
    groups: int = 1  #: groups of images that a jackknife can leave out, at most 16; 1 for none
    noise_floor: bool = True  #: also pair each image with the next one of its unit
    precision: Precision = "float64"  #: of the products of tokens and patches

    @property
    def one_per_image(self) -> bool:
        """Whether samples are independent: one per image."""
        return self.sampling in ("class", "mean")

    @property
    def products(self) -> torch.dtype:
        """Number format of the products."""
        return torch.float64 if self.one_per_image or self.precision == "float64" else torch.float32

    @property
    def shifted_products(self) -> torch.dtype:
        """Number format of the noise floor's products: a floor needs no more than float32."""
        return torch.float64 if self.one_per_image else torch.float32

    def check(self) -> None:
        """Raise a `UsageError` unless every option is one of its choices and the groups suit the scope."""
        choices = {"scope": Scope, "sampling": Sampling, "precision": Precision}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if not 1 <= self.groups <= MAX_GROUPS:
            raise UsageError(f"the jackknife's groups of images must be 1 (no jackknife) to 16, got {self.groups}")
        if self.groups > 1 and self.scope != "within":
            rule = "a jackknife keeps the moments once per group: only for the scope 'within', use groups=1"
            raise UsageError(f"{rule}, got groups={self.groups} with scope {self.scope!r}")
