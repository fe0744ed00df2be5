"""Text to masks: which heads of which layers to mask. Knows no model, and no torch until a mask becomes a tensor."""

from headprobe.masks.head_mask import HeadMask
from headprobe.masks.spec import MaskSpec, MaskSpecError, NamedMask, Variant, expand_all

__all__ = ["HeadMask", "MaskSpec", "MaskSpecError", "NamedMask", "Variant", "expand_all"]
