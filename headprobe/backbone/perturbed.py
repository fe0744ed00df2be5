"""Perturbs every parameter of a model: zero-initialised projections, scales and tables would hide errors."""

import math

import torch
from torch import nn


def perturbed(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """Add seeded normal noise to every parameter in place, and return the model.

    Weights of more than one axis get noise that keeps the size of what passes through them: half a standard deviation
    over the square root of their inputs. Vectors, which are norms, biases and scales, get 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.is_floating_point():
                inputs = parameter[0].numel() if parameter.dim() > 1 else 0
                size = 0.5 / math.sqrt(inputs) if inputs else 0.1
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.device, parameter.dtype))
    return backbone
