"""Convolution experts at several scales: E_s(z) = down_s(act(conv3x3(up_s(z)))), bicubic both ways."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvExperts(nn.Module):
    """One 3 x 3 convolution per scale, applied on a grid `scale` times finer than the tokens'.

    Args:
        channels: of the maps.
        num_experts: expert i works at scale i + 1.
        activation: GELU as in the released code, or the identity as in the paper's equation.
    """

    def __init__(self, channels: int, num_experts: int, activation: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(num_experts, channels))
        self.activation = activation
        for weight in self.weight:  # as PyTorch initialises one convolution
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, z: Tensor, gates: Tensor) -> Tensor:
        """Return sum_i gates[:, i] E_i(z).

        Args:
            z: maps [n, h, w, channels].
            gates: [n, num_experts]; an expert runs only for the maps whose gate is not zero.
        """
        maps = z.permute(0, 3, 1, 2)
        mixed = torch.zeros_like(maps)
        for index in range(gates.shape[1]):
            chosen = gates[:, index].nonzero().squeeze(1)
            if len(chosen):
                out = gates[chosen, index, None, None, None].to(maps.dtype) * self.expert(index, maps[chosen])
                mixed = mixed.index_add(0, chosen, out.to(mixed.dtype))
        return mixed.permute(0, 2, 3, 1)

    def expert(self, index: int, maps: Tensor) -> Tensor:
        """Apply one expert to maps [n, channels, h, w]."""
        size, scale = maps.shape[2:], index + 1
        fine = F.interpolate(maps, scale_factor=scale, mode="bicubic")
        fine = self.activation(F.conv2d(fine, self.weight[index], self.bias[index], padding=1))
        return F.interpolate(fine, size=size, mode="bicubic")
