"""Gates of a mixture of experts: noisy top-k routing with a balance loss.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017,
arXiv:1701.06538, equations 3 to 11 and appendix A.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.peft.method import HasAuxLoss

NOISE_FLOOR = 1e-2  # standard deviation of the noise that no training can remove
BALANCE_WEIGHT = 1e-2


class Routes(NamedTuple):
    """What a gate decides.

    Attributes:
        choice: indices of the chosen experts [n, k].
        gates: their weights [n, k], positive.
    """

    choice: Tensor
    gates: Tensor


class Gate(ABC):
    """A recipe for the gates of a mixture."""

    @abstractmethod
    def build(self, channels: int, num_experts: int) -> nn.Module:
        """Return one layer's own gate, which maps [n, h, w, channels] to `Routes` and records its `aux_loss`.

        Raises:
            ValueError: it cannot choose from so many experts.
        """


@dataclass(frozen=True)
class NoisyTopK(Gate):
    """The released Conv-LoRA's gate.

    Args:
        top_k: experts kept per map, from 1 to their number.
    """

    top_k: int = 1

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"peft.gate.top_k={self.top_k} must be at least 1")

    def build(self, channels: int, num_experts: int) -> "NoisyTopKGate":
        """Return a gate that has learnt nothing yet."""
        if self.top_k > num_experts:
            raise ValueError(
                f"peft.gate.top_k={self.top_k} must lie between 1 and peft.num_experts={num_experts}"
            )
        return NoisyTopKGate(channels, num_experts, self.top_k)


class NoisyTopKGate(HasAuxLoss):
    """Chooses `top_k` of `num_experts` experts for each map by the mean of its tokens; weights of sum 1.

    With `top_k=1` the softmax over the one kept logit is the constant 1: the gate then learns from the
    balance loss alone, which is how the published Conv-LoRA was trained. Always computes in float32, since
    half precision makes the routing overflow.

    Args:
        channels: of the maps.
        num_experts: to choose from.
        top_k: experts kept per map.

    Attributes:
        aux_loss: balance loss of the last forward pass in training.
    """

    def __init__(self, channels: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.zeros(channels, num_experts))
        self.noise_weight = nn.Parameter(torch.zeros(channels, num_experts))

    def forward(self, z: Tensor) -> Routes:
        """Route maps [n, h, w, channels]; with noise and balance loss in training only."""
        with torch.autocast(z.device.type, enabled=False):
            features = z.float().mean(dim=(1, 2))
            clean = features @ self.weight.float()
            if not self.training:
                return route(clean, self.top_k)
            std = F.softplus(features @ self.noise_weight.float()) + NOISE_FLOOR
            noisy = clean + torch.randn_like(clean) * std
            routes = route(noisy, self.top_k)
            importance = torch.zeros_like(noisy).scatter(1, *routes)
            if self.top_k < noisy.shape[1]:
                load = prob_in_top_k(clean, noisy, std, self.top_k)
            else:
                load = torch.ones_like(noisy)
            self.aux_loss = balance_loss(importance, load)
        return routes


def route(logits: Tensor, top_k: int) -> Routes:
    """Keep the `top_k` largest of logits [n, e] with softmax weights among themselves."""
    top = logits.topk(top_k)
    return Routes(top.indices, top.values.softmax(dim=1))


def balance_loss(gates: Tensor, load: Tensor) -> Tensor:
    """Return 0.01 (CV^2(importance) + CV^2(load)), low where all experts are used alike.

    Args:
        gates: weight of each expert for each map [n, e], 0 where it was not chosen; an expert's importance is
            its sum.
        load: probability that each expert is chosen for each map [n, e].
    """
    return BALANCE_WEIGHT * (cv_squared(gates.sum(dim=0)) + cv_squared(load.sum(dim=0)))


def prob_in_top_k(clean: Tensor, noisy: Tensor, std: Tensor, top_k: int) -> Tensor:
    """Probability that each expert stays among the chosen under fresh noise of its own (appendix A).

    Args:
        clean: logits without noise [n, e].
        noisy: the logits that were used [n, e].
        std: standard deviation of the noise [n, e].
        top_k: number of chosen experts, less than e.

    Returns:
        Probabilities [n, e], differentiable in `clean` and `std`.
    """
    top_values = noisy.topk(top_k + 1).values
    # The k-th largest of the others: an expert that is in competes with the first one left out.
    to_stay_in, to_get_in = top_values[:, -1:], top_values[:, -2:-1]
    threshold = torch.where(noisy > to_stay_in, to_stay_in, to_get_in)
    probability: Tensor = torch.special.ndtr((clean - threshold) / std)
    return probability


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation of a vector, 0 for a single element."""
    if x.numel() == 1:
        return x.new_zeros(())
    return x.var() / (x.mean() ** 2 + 1e-10)
