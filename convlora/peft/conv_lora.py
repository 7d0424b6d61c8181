"""Conv-LoRA: a mixture of multi-scale convolution experts in LoRA's bottleneck.

Zhong, Tang, He, Fang, Yuan, "Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything
Model", ICLR 2024, arXiv:2401.17868. The paper's equation and the code that produced its numbers differ; each
is a class here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from convlora.peft.conv_experts import Activation, ConvExperts, Interpolation
from convlora.peft.gating import Gate, NoisyTopK
from convlora.peft.lora import LoRALinear, check_alpha, check_rate
from convlora.peft.method import LinearMethod

EXPERTS = 8  # where nothing is said, as released
MOST = 128  # scale, since no grid of tokens is wider


class Routed(NamedTuple):
    """How the maps of a pass went through the experts.

    Attributes:
        choice: indices of the experts [n, k].
        gates: their weights [n, k].
        side: height of each map in tokens.
    """

    choice: Tensor
    gates: Tensor
    side: int


class ConvLoRAEquationLinear(LoRALinear):
    """The paper's equation: y = W x + (alpha / rank) B (sum_i G(z)_i E_i(z)) with z = A x and linear experts.

    The gate chooses per map: per window in windowed attention, per image in global attention.

    Args:
        base: the frozen layer.
        rank: channels of the bottleneck.
        alpha: scale of the update, in units of the rank; `rank` in the paper, which has none.
        scales: of the experts.
        gate: recipe of the layer's own gate.
        interpolation: between the tokens' grid and the experts'.
        b_rate: learning rate of B as a multiple of the others'.

    Attributes:
        routes: of the last pass.
    """

    activation: Activation = "identity"
    routes: Routed

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        scales: Sequence[float],
        gate: Gate,
        interpolation: Interpolation = "bicubic",
        b_rate: float = 1.0,
    ):
        super().__init__(base, rank, alpha, b_rate)
        self.gate = gate.build(rank, len(scales))
        self.gate_sees_maps = gate.sees_maps
        self.experts = ConvExperts(rank, scales, self.activation, interpolation)

    def bottleneck(self, z: Tensor) -> Tensor:
        """Return the chosen experts' output for tokens [n, h, w, rank] or [n, l, rank], l a square window."""
        grid = as_grid(z)
        choice, gates = self.gate(grid)
        self.routes = Routed(choice, gates.detach(), grid.shape[1])
        mixed: Tensor = self.experts(grid, choice, gates)
        return mixed.reshape(z.shape)


class ConvLoRALinear(ConvLoRAEquationLinear):
    """The released form: y = W x + (alpha / rank) B (z + sum_i G(z)_i E_i(z)) with GELU experts."""

    activation = "gelu"

    def bottleneck(self, z: Tensor) -> Tensor:
        """Add the chosen experts' output to the tokens."""
        return z + super().bottleneck(z)


def as_grid(tokens: Tensor) -> Tensor:
    """Return tokens as maps [n, h, w, c]; windows [n, l, c] must be square.

    Raises:
        ValueError: the tokens have no grid.
    """
    if tokens.ndim == 4:
        return tokens
    side = math.isqrt(tokens.shape[1]) if tokens.ndim == 3 else 0
    if side == 0 or side * side != tokens.shape[1]:
        raise ValueError(
            f"Conv-LoRA needs tokens on a grid, [n, h, w, c] or square windows [n, l, c], got "
            f"{list(tokens.shape)}; choose other peft.targets or peft=lora"
        )
    return tokens.view(tokens.shape[0], side, side, -1)


@dataclass(frozen=True, kw_only=True)
class ConvLoRAEquation(LinearMethod):
    """Conv-LoRA as the paper writes it: no residual in the bottleneck, linear experts, no alpha.

    Args:
        rank: channels of the bottleneck.
        num_experts: how many there are, at scales 1 to `num_experts` where no scales are given; None for as
            many as scales, or `EXPERTS`.
        scales: of the experts, one for each, from 1/128 to 128: 2 is a grid twice as fine as the tokens',
            0.5 one half as fine; None for 1 to `num_experts`.
        gate: which of them each map passes through.
        targets: ends of the names of the adapted layers.
        blocks: indices of the adapted transformer blocks, negative from the end; None for all.
        interpolation: between the tokens' grid and the experts', bicubic or bilinear.
        b_rate: learning rate of B as a multiple of the others', as in LoRA+.
    """

    width = "rank"

    rank: int = 3
    num_experts: int | None = None
    scales: Sequence[float] | None = None
    gate: Gate = field(default_factory=NoisyTopK)
    interpolation: Interpolation = "bicubic"
    b_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"peft.rank={self.rank} must be at least 1")
        check_rate(self.b_rate)
        if self.scales is not None and not self.scales:
            raise ValueError(
                "peft.scales=[] leaves no experts; give one for each, or null for 1 to num_experts"
            )
        if self.num_experts is not None and self.num_experts < 1:
            raise ValueError(f"peft.num_experts={self.num_experts} must be at least 1")
        if self.scales is not None and self.num_experts not in (None, len(self.scales)):
            raise ValueError(
                f"peft.scales={list(self.scales)} has {len(self.scales)} entries, but "
                f"peft.num_experts={self.num_experts}; leave one of the two out, or let them agree"
            )
        if self.scales is not None and not all(1 / MOST <= scale <= MOST for scale in self.scales):
            raise ValueError(f"peft.scales={list(self.scales)} must be numbers from 1/{MOST} to {MOST}")
        if not isinstance(self.gate, Gate):
            raise ValueError(f"peft.gate={self.gate} is no gate; choose one such as peft/gate=noisy_top_k")

    @property
    def expert_scales(self) -> Sequence[float]:
        """The scale of each expert."""
        return range(1, (self.num_experts or EXPERTS) + 1) if self.scales is None else self.scales

    def adapt(self, layer: nn.Linear) -> ConvLoRAEquationLinear:
        return ConvLoRAEquationLinear(
            layer, self.rank, self.rank, self.expert_scales, self.gate, self.interpolation, self.b_rate
        )


@dataclass(frozen=True, kw_only=True)
class ConvLoRA(ConvLoRAEquation):
    """Conv-LoRA as the authors released it, the form behind the published numbers.

    Args:
        alpha: scale of the update, in units of the rank; the others are the equation's.
    """

    alpha: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)

    def adapt(self, layer: nn.Linear) -> ConvLoRALinear:
        return ConvLoRALinear(
            layer, self.rank, self.alpha, self.expert_scales, self.gate, self.interpolation, self.b_rate
        )
