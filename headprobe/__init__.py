"""What does each attention head do? Mask heads of any timm vision transformer and measure what the model loses."""

__version__ = "0.1.0"
