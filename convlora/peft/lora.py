"""LoRA (Hu et al., ICLR 2022, arXiv:2106.09685): a trainable low-rank update of a frozen linear layer."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convlora.peft.method import Adapted, LinearMethod


class LoRALinear(Adapted):
    """A frozen linear layer with its low-rank update: y = W x + (alpha / rank) B A x.

    A starts as PyTorch initialises a linear layer, B at zero: the adapted layer starts as the frozen one.

    Args:
        base: the frozen layer.
        rank: of the update.
        alpha: scale of the update, in units of the rank.
        b_rate: learning rate of B as a multiple of the others' (LoRA+: Hayou, Ghosh, Yu, ICML 2024,
            arXiv:2402.12354).
    """

    base: nn.Linear

    def __init__(self, base: nn.Linear, rank: int, alpha: float, b_rate: float = 1.0):
        super().__init__()
        self.base = base
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.scaling = alpha / rank
        self.rates = {"lora_b.weight": b_rate}

    def bottleneck(self, z: Tensor) -> Tensor:
        """Map the tokens between A and B, [..., rank] to [..., rank]; plain LoRA leaves them as they are."""
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., c_in] to [..., c_out]."""
        update: Tensor = self.lora_b(self.bottleneck(self.lora_a(x)))
        y: Tensor = self.base(x) + self.scaling * update
        return y

    def merged(self) -> nn.Module:
        """Return the linear layer of weight W + (alpha / rank) B A."""
        if type(self).bottleneck is not LoRALinear.bottleneck:  # a subclass does more between A and B
            return super().merged()
        layer = copy.deepcopy(self.base).float()  # half precision would lose what is small beside a weight
        with torch.no_grad():
            layer.weight += self.scaling * self.lora_b.weight @ self.lora_a.weight
        return layer


@dataclass(frozen=True)
class LoRA(LinearMethod):
    """Plain LoRA on the linear layers named by `targets`.

    Args:
        rank: of the update, at least 1.
        alpha: scale of the update, in units of the rank.
        targets: ends of the names of the adapted layers.
        blocks: indices of the adapted transformer blocks, negative from the end; None for all.
        b_rate: learning rate of B as a multiple of the others', as in LoRA+.
    """

    width = "rank"

    rank: int = 3
    alpha: float = 32.0
    b_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"peft.rank={self.rank} must be at least 1")
        check_alpha(self.alpha)
        check_rate(self.b_rate)

    def adapt(self, layer: nn.Linear) -> LoRALinear:
        return LoRALinear(layer, self.rank, self.alpha, self.b_rate)


def check_alpha(alpha: float) -> None:
    """Refuse a scale of the update that is none; raises ValueError."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"peft.alpha={alpha} must be positive; 32 is the released value")


def check_rate(b_rate: float) -> None:
    """Refuse a multiple of the learning rate that is none; raises ValueError."""
    if not 0 < b_rate < math.inf:
        raise ValueError(f"peft.b_rate={b_rate} must be positive; 1 trains B at the rate of the others")
