"""Conv-LoRA: a mixture of multi-scale convolution experts in LoRA's bottleneck.

Zhong, Tang, He, Fang, Yuan, "Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything
Model", ICLR 2024, arXiv:2401.17868. The paper's equation and the code that produced its numbers differ; each
is a class here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from convlora.peft.conv_experts import POINTS, ConvExperts, Interpolation
from convlora.peft.gating import NoisyTopKGate
from convlora.peft.lora import LoRALinear
from convlora.peft.method import replace_linears


class ConvLoRALinear(LoRALinear):
    """The released form: y = W x + (alpha / rank) B (z + sum_i G(z)_i E_i(z)) with z = A x and GELU experts.

    The gate chooses per map: per window in windowed attention, per image in global attention.

    Args:
        base: the frozen layer.
        rank: channels of the bottleneck.
        alpha: scale of the update, in units of the rank.
        num_experts: experts at scales 1 to `num_experts`.
        top_k: experts per map.
        interpolation: between the tokens' grid and the experts'.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        num_experts: int,
        top_k: int,
        interpolation: Interpolation = "bicubic",
    ):
        super().__init__(base, rank, alpha)
        self.gate = NoisyTopKGate(rank, num_experts, top_k)
        self.experts = ConvExperts(rank, range(1, num_experts + 1), "gelu", interpolation)

    def bottleneck(self, z: Tensor) -> Tensor:
        """Add the chosen experts' output to the tokens [n, h, w, rank] or [n, l, rank], l a square window."""
        grid = as_grid(z)
        mixed: Tensor = self.experts(grid, *self.gate(grid))
        return z + mixed.reshape(z.shape)


class ConvLoRAEquationLinear(LoRALinear):
    """The paper's equation: y = W x + B (sum_i G(z)_i E_i(z)) with z = A x and linear experts.

    Args:
        base: the frozen layer.
        rank: channels of the bottleneck.
        num_experts: experts at scales 1 to `num_experts`.
        top_k: experts per map.
        interpolation: between the tokens' grid and the experts'.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        num_experts: int,
        top_k: int,
        interpolation: Interpolation = "bicubic",
    ):
        super().__init__(base, rank, alpha=rank)
        self.gate = NoisyTopKGate(rank, num_experts, top_k)
        self.experts = ConvExperts(rank, range(1, num_experts + 1), "identity", interpolation)

    def bottleneck(self, z: Tensor) -> Tensor:
        """Replace the tokens [n, h, w, rank] or [n, l, rank] by the chosen experts' output."""
        grid = as_grid(z)
        mixed: Tensor = self.experts(grid, *self.gate(grid))
        return mixed.reshape(z.shape)


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
    return tokens.view(len(tokens), side, side, -1)


@dataclass(frozen=True)
class ConvLoRA:
    """Conv-LoRA as the authors released it, the form behind the published numbers.

    Args:
        rank: channels of the bottleneck.
        alpha: scale of the update, in units of the rank.
        num_experts: experts at scales 1 to `num_experts`.
        top_k: experts per map, at most `num_experts`.
        targets: ends of the names of the adapted layers.
        blocks: indices of the adapted transformer blocks, negative from the end; None for all.
        interpolation: between the tokens' grid and the experts', bicubic or bilinear.
    """

    rank: int = 3
    alpha: float = 32.0
    num_experts: int = 8
    top_k: int = 1
    targets: Sequence[str] = ("qkv",)
    blocks: Sequence[int] | None = None
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        check_mixture(self.rank, self.num_experts, self.top_k, self.interpolation)

    def inject(self, encoder: nn.Module) -> nn.Module:
        """Adapt the encoder in place and return it."""
        replace_linears(
            encoder,
            self.targets,
            self.blocks,
            lambda base: ConvLoRALinear(
                base, self.rank, self.alpha, self.num_experts, self.top_k, self.interpolation
            ),
        )
        return encoder


@dataclass(frozen=True)
class ConvLoRAEquation:
    """Conv-LoRA as the paper writes it: no residual in the bottleneck, linear experts, no alpha.

    Args:
        rank: channels of the bottleneck.
        num_experts: experts at scales 1 to `num_experts`.
        top_k: experts per map, at most `num_experts`.
        targets: ends of the names of the adapted layers.
        blocks: indices of the adapted transformer blocks, negative from the end; None for all.
        interpolation: between the tokens' grid and the experts', bicubic or bilinear.
    """

    rank: int = 3
    num_experts: int = 8
    top_k: int = 1
    targets: Sequence[str] = ("qkv",)
    blocks: Sequence[int] | None = None
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        check_mixture(self.rank, self.num_experts, self.top_k, self.interpolation)

    def inject(self, encoder: nn.Module) -> nn.Module:
        """Adapt the encoder in place and return it."""
        replace_linears(
            encoder,
            self.targets,
            self.blocks,
            lambda base: ConvLoRAEquationLinear(
                base, self.rank, self.num_experts, self.top_k, self.interpolation
            ),
        )
        return encoder


def check_mixture(rank: int, num_experts: int, top_k: int, interpolation: str) -> None:
    """Refuse settings that make no mixture of experts."""
    if rank < 1:
        raise ValueError(f"peft.rank={rank} must be at least 1")
    if num_experts < 1:
        raise ValueError(f"peft.num_experts={num_experts} must be at least 1")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"peft.top_k={top_k} must lie between 1 and peft.num_experts={num_experts}")
    if interpolation not in POINTS:
        raise ValueError(f"peft.interpolation={interpolation} must be one of {', '.join(POINTS)}")
