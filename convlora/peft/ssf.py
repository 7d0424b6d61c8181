"""SSF (Lian et al., NeurIPS 2022, arXiv:2210.08823): features are scaled and shifted after every layer."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlora.peft.method import LAYERS, Adapted, Method


class ScaleShift(Adapted):
    """A frozen layer with a learnt scale and shift of each channel that it gives: y = scale base(x) + shift.

    The scale starts at exactly 1 and the shift at 0, where the authors draw both around these with a standard
    deviation of 0.02: the adapted layer starts as the frozen one. A layer without bias gets no shift, so that
    all that is learnt folds into the weights.

    Args:
        base: the frozen layer, one of `LAYERS`.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        weight = base.weight
        assert isinstance(weight, Tensor)
        self.scale = nn.Parameter(torch.ones(len(weight)))
        self.shift = None if base.bias is None else nn.Parameter(torch.zeros(len(weight)))
        # channels come last in tokens, and first in maps [n, c, h, w]
        self.spread = (-1,) if isinstance(base, nn.Linear | nn.LayerNorm) else (-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map what the frozen layer maps, to the same shape and type."""
        y: Tensor = self.base(x)
        scale = self.scale.view(self.spread).to(y.dtype)
        if self.shift is None:
            return y * scale
        return torch.addcmul(self.shift.view(self.spread).to(y.dtype), y, scale)

    def merged(self) -> nn.Module:
        """Return the layer with its weight scaled, and its bias scaled and shifted."""
        layer = copy.deepcopy(self.base).float()  # half precision would lose what is small beside a weight
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight *= self.scale.view(-1, *(1,) * (weight.ndim - 1))
            if isinstance(bias, Tensor) and self.shift is not None:
                bias.mul_(self.scale).add_(self.shift)
        return layer


@dataclass(frozen=True)
class SSF(Method):
    """A learnt scale and shift after every linear layer, convolution and norm of the image encoder."""

    def inject(self, encoder: nn.Module) -> nn.Module:
        for name, module in list(encoder.named_modules()):
            if isinstance(module, LAYERS):
                encoder.set_submodule(name, ScaleShift(module), strict=True)
        return encoder
