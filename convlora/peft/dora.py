"""DoRA (Liu et al., ICML 2024, arXiv:2402.09353): magnitude and direction of the weights learn apart."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlora.peft.lora import LoRA, LoRALinear
from convlora.peft.method import without_autocast


class DoRALinear(LoRALinear):
    """A frozen linear layer whose rows' directions LoRA updates, their lengths being learnt apart.

    y = m V x / ||V|| + bias with V = W + (alpha / rank) B A, where ||V|| is the length of each row; m starts
    as ||W||. Gradients take ||V|| for a constant (section 4.3 of the paper).

    Args:
        base: the frozen layer.
        rank: of the update.
        alpha: scale of the update, in units of the rank.
        b_rate: learning rate of B as a multiple of the others'.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, b_rate: float = 1.0):
        super().__init__(base, rank, alpha, b_rate)
        self.magnitude = nn.Parameter(self.norm())

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the length of each row of V, [c_out] in float32.

        With w and b rows of W and B, ||w + s b A||^2 = ||w||^2 + 2 s b.(A w) + s^2 b (A A^T) b^T. This makes
        no matrix of W's size, unless W is held in half precision. Rows of zeros have the least length.
        """
        weight = self.base.weight.float()
        a, b = self.lora_a.weight.float(), self.scaling * self.lora_b.weight.float()
        crossed = 2 * (weight @ a.T) + b @ (a @ a.T)
        squared = torch.linalg.vector_norm(weight, dim=1).square() + (b * crossed).sum(dim=1)
        length: Tensor = squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return length

    def scale(self) -> Tensor:
        """Return m / ||V||, [c_out] in float32; 1 at the start."""
        with without_autocast(self.magnitude.device):
            return self.magnitude.float() / self.norm()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., c_in] to [..., c_out]."""
        y: Tensor = self.base(x)
        update = self.scaling * self.lora_b(self.lora_a(x))
        frozen = y if self.base.bias is None else y - self.base.bias.to(y.dtype)
        scale = self.scale()
        # the frozen layer's output comes in whole, so that it goes out as it was where the scale is 1
        adapted: Tensor = y + (scale - 1).to(y.dtype) * frozen + scale.to(y.dtype) * update
        return adapted

    def merged(self) -> nn.Module:
        """Return the linear layer of weight m V / ||V||."""
        layer = super().merged()
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight *= self.scale()[:, None]
        return layer


@dataclass(frozen=True)
class DoRA(LoRA):
    """DoRA on the linear layers named by `targets`; its arguments are LoRA's."""

    def adapt(self, layer: nn.Linear) -> DoRALinear:
        return DoRALinear(layer, self.rank, self.alpha, self.b_rate)
