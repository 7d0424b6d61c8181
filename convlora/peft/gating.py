"""Gates of a mixture of experts: which experts each map passes through, and with what weights.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", ICLR 2017,
arXiv:1701.06538, equations 3 to 11 and appendix A; Fedus, Zoph, Shazeer, "Switch Transformers: Scaling to
Trillion Parameter Models with Simple and Efficient Sparsity", JMLR 2022, arXiv:2101.03961, section 2.2.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlora.peft.method import HasAuxLoss, without_autocast

Sees = Literal["mean", "spread"]
Schedule = Literal["constant", "linear"]
NOISE_FLOOR = 1e-2  # standard deviation of the noise that no training can remove
BALANCE_WEIGHT = 1e-2
LEAST_VARIANCE = 1e-6  # of the tokens of a map, since a root has no slope at 0


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

    sees_maps: ClassVar[bool] = True
    """Whether the weights of the experts follow from the map."""

    @abstractmethod
    def build(self, channels: int, num_experts: int) -> nn.Module:
        """Return one layer's own gate, which maps [n, h, w, channels] to `Routes`.

        One that balances its experts is a `HasAuxLoss` and records its `aux_loss` in training.

        Raises:
            ValueError: it cannot choose from so many experts.
        """


@dataclass(frozen=True, kw_only=True)
class Balanced(Gate):
    """A gate that sees the maps and may be kept from preferring few experts.

    Args:
        sees: `mean` of a map's tokens, or `spread`, mean and standard deviation.
        balance: weight of the balance loss; 0 switches it off.
        schedule: of that weight: `constant`, or `linear`, which falls to 0 over the training.
    """

    sees: Sees = "mean"
    balance: float = BALANCE_WEIGHT
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.balance < math.inf:
            raise ValueError(
                f"peft.gate.balance={self.balance} must be a number of at least 0; 0 switches the loss off"
            )

    def num_features(self, channels: int) -> int:
        """Return how many numbers it sees of a map."""
        return 2 * channels if self.sees == "spread" else channels

    def features(self, z: Tensor) -> Tensor:
        """Return what it sees of maps [n, h, w, channels]: [n, num_features]."""
        mean = z.mean(dim=(1, 2))
        if self.sees == "mean":
            return mean
        return torch.cat([mean, (z.var(dim=(1, 2), correction=0) + LEAST_VARIANCE).sqrt()], dim=1)


@dataclass(frozen=True, kw_only=True)
class NoisyTopK(Balanced):
    """The released Conv-LoRA's gate.

    Args:
        top_k: experts kept per map, from 1 to their number.
    """

    top_k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"peft.gate.top_k={self.top_k} must be at least 1")
        if self.balance == 0 and self.top_k == 1:
            raise ValueError(
                "peft.gate.balance=0 leaves a gate of top_k=1 nothing to learn; set peft.gate.top_k=2, or "
                "choose peft/gate=switch, which the task trains"
            )

    def build(self, channels: int, num_experts: int) -> "NoisyTopKGate":
        """Return a gate that has learnt nothing yet."""
        if self.top_k > num_experts:
            raise ValueError(
                f"peft.gate.top_k={self.top_k} must lie between 1 and peft.num_experts={num_experts}"
            )
        return NoisyTopKGate(self, channels, num_experts)


@dataclass(frozen=True, kw_only=True)
class Switch(Balanced):
    """The Switch Transformer's gate: one expert for each map, weighted by its probability."""

    def build(self, channels: int, num_experts: int) -> "SwitchGate":
        """Return a gate of random weights, by which maps differ in their expert from the start."""
        return SwitchGate(self, channels, num_experts)


@dataclass(frozen=True, kw_only=True)
class Soft(Balanced):
    """Every expert for every map, weighted by a softmax of what the gate sees of the map."""

    balance: float = 0.0

    def build(self, channels: int, num_experts: int) -> "SoftGate":
        """Return a gate that weights all experts alike."""
        return SoftGate(self, channels, num_experts)


@dataclass(frozen=True)
class Layer(Gate):
    """Every expert, with weights that a layer learns once for all maps."""

    sees_maps = False

    def build(self, channels: int, num_experts: int) -> "LayerGate":
        """Return a gate that weights all experts alike."""
        return LayerGate(num_experts)


@dataclass(frozen=True)
class Uniform(Gate):
    """Every expert with the same weight; nothing is learnt."""

    sees_maps = False

    def build(self, channels: int, num_experts: int) -> "UniformGate":
        """Return the gate; it has no parameters."""
        return UniformGate(num_experts)


class BalancedGate(HasAuxLoss, ABC):
    """One layer's gate that sees the maps; it may record a balance loss.

    Always computes in float32, since half precision makes the routing overflow.

    Args:
        recipe: what it sees, and how its experts are balanced.

    Attributes:
        aux_loss: balance loss of the last forward pass in training; none is recorded of weight 0.
    """

    def __init__(self, recipe: Balanced):
        super().__init__()
        self.recipe = recipe

    def aux_weight(self, progress: float) -> float:
        return 1 - progress if self.recipe.schedule == "linear" else 1.0

    def forward(self, z: Tensor) -> Routes:
        """Route maps [n, h, w, channels]."""
        with without_autocast(z.device):
            return self.route(self.recipe.features(z.float()))

    @abstractmethod
    def route(self, features: Tensor) -> Routes:
        """Route maps by their features [n, f] in float32, and record the balance loss in training."""


class NoisyTopKGate(BalancedGate):
    """Chooses `top_k` of `num_experts` experts for each map by what it sees of it; weights of sum 1.

    With `top_k=1` the softmax over the one kept logit is the constant 1: the gate then learns from the
    balance loss alone, which is how the published Conv-LoRA was trained. Noise in training only.

    Args:
        recipe: what it sees, how many experts it keeps, and how they are balanced.
        channels: of the maps.
        num_experts: to choose from.
    """

    def __init__(self, recipe: NoisyTopK, channels: int, num_experts: int):
        super().__init__(recipe)
        self.top_k = recipe.top_k
        self.weight = nn.Parameter(torch.zeros(recipe.num_features(channels), num_experts))
        self.noise_weight = nn.Parameter(torch.zeros(recipe.num_features(channels), num_experts))

    def route(self, features: Tensor) -> Routes:
        clean = features @ self.weight.float()
        if not self.training:
            return route(clean, self.top_k)
        std = F.softplus(features @ self.noise_weight.float()) + NOISE_FLOOR
        noisy = clean + torch.randn_like(clean) * std
        routes = route(noisy, self.top_k)
        if self.recipe.balance:
            importance = torch.zeros_like(noisy).scatter(1, *routes)
            if self.top_k < noisy.shape[1]:
                load = prob_in_top_k(clean, noisy, std, self.top_k)
            else:
                load = torch.ones_like(noisy)
            self.aux_loss = balance_loss(importance, load, self.recipe.balance)
        return routes


class SwitchGate(BalancedGate):
    """Sends each map to the most probable expert and weights what that returns by its probability.

    So the task trains the gate. The balance loss is balance * E * sum_i f_i P_i, where f_i is the share of
    the maps that expert i got and P_i its mean probability.

    Args:
        recipe: what it sees, and how its experts are balanced.
        channels: of the maps.
        num_experts: E.
    """

    def __init__(self, recipe: Switch, channels: int, num_experts: int):
        super().__init__(recipe)
        features = recipe.num_features(channels)
        # weights of zero would send every map to expert 0
        self.weight = nn.Parameter(torch.randn(features, num_experts) * math.sqrt(0.1 / features))

    def route(self, features: Tensor) -> Routes:
        probs = (features @ self.weight.float()).softmax(dim=1)
        gates, choice = probs.max(dim=1, keepdim=True)
        if self.training and self.recipe.balance:
            share = torch.zeros_like(probs).scatter(1, choice, 1.0).mean(dim=0)
            self.aux_loss = self.recipe.balance * probs.shape[1] * (share * probs.mean(dim=0)).sum()
        return Routes(choice, gates)


class SoftGate(BalancedGate):
    """Weights all experts by a softmax; the balance loss is balance * CV^2(importance).

    Args:
        recipe: what it sees, and how its experts are balanced.
        channels: of the maps.
        num_experts: to weight.
    """

    def __init__(self, recipe: Soft, channels: int, num_experts: int):
        super().__init__(recipe)
        self.weight = nn.Parameter(torch.zeros(recipe.num_features(channels), num_experts))

    def route(self, features: Tensor) -> Routes:
        gates = (features @ self.weight.float()).softmax(dim=1)
        if self.training and self.recipe.balance:
            self.aux_loss = self.recipe.balance * cv_squared(gates.sum(dim=0))
        return to_all(gates)


class LayerGate(nn.Module):
    """Weights all experts by one softmax, whatever the map.

    Args:
        num_experts: to weight.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_experts))

    def forward(self, z: Tensor) -> Routes:
        """Route maps [n, h, w, channels]."""
        return to_all(self.logits.float().softmax(dim=0).expand(z.shape[0], -1))


class UniformGate(nn.Module):
    """Weights all experts alike.

    Args:
        num_experts: to weight.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, z: Tensor) -> Routes:
        """Route maps [n, h, w, channels]."""
        shape = (z.shape[0], self.num_experts)
        return to_all(torch.full(shape, 1 / self.num_experts, dtype=torch.float32, device=z.device))


def to_all(gates: Tensor) -> Routes:
    """Send each map to every expert, with weights [n, e]."""
    return Routes(torch.arange(gates.shape[1], device=gates.device).expand_as(gates), gates)


def route(logits: Tensor, top_k: int) -> Routes:
    """Keep the `top_k` largest of logits [n, e] with softmax weights among themselves."""
    top = logits.topk(top_k)
    return Routes(top.indices, top.values.softmax(dim=1))


def balance_loss(gates: Tensor, load: Tensor, weight: float) -> Tensor:
    """Return weight (CV^2(importance) + CV^2(load)), low where all experts are used alike.

    Args:
        gates: weight of each expert for each map [n, e], 0 where it was not chosen; an expert's importance is
            its sum.
        load: probability that each expert is chosen for each map [n, e].
        weight: of the loss.
    """
    return weight * (cv_squared(gates.sum(dim=0)) + cv_squared(load.sum(dim=0)))


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
