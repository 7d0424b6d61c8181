"""Convolution experts at any scale, exact, at a cost that does not grow with the scale.

The expert of scale s is E_s(z) = down(act(conv3x3(up(z)))), where up resamples the tokens' grid to one s
times as fine and down back; below 1 the grid is coarser, and up takes means over areas. Resampling is
separable: along one axis of h tokens and g = ceil(s h) points, up is a matrix [g, h] and down one [h, g].
Each row of down has few entries, at the m points nearest to the token's centre: m = 1 where s is odd, since a
point lies on the centre, else 2 (bilinear) or 4 (bicubic). So the convolution is needed at m points per token
and axis only, and reads points at most one step from these. With

    R_u [m h, h]   the rows of up at those points shifted by u = -1, 0, 1; a row of zeros outside the grid,
                   which is the convolution's zero padding
    D [h, m]       the entries of down at those points
    C_v, D'        the same along the other axis

the expert is, borders and clamped taps included, for every s,

    E(z)_o = sum_ab D_a D'_b act(bias_o + sum_uvi k_oiuv R_u z_i C_v^T)_ab.

The scale enters by constant matrices whose sizes do not depend on it. They are gathered for each map by its
gate together with k and bias, and three batched products give all maps their own expert at once. R and C are
banded, so long axes are cut into tiles with margins, unless a coarse scale reaches so far that margins would
outweigh the tiles. If act is the identity, D moves into R and C, and m = 1 serves every scale: a 3 x 3
convolution of resampled tokens.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from convlora.peft.method import without_autocast

Activation = Literal["gelu", "identity"]
Interpolation = Literal["bicubic", "bilinear"]
Kind = tuple[tuple[float, ...], Interpolation, Activation]
TILE = 16  # tokens; a longer axis is cut into tiles, since most entries of its matrices would be zero
POINTS = {"bicubic": 4, "bilinear": 2}  # points per axis that interpolation reads; 1 where it meets one


class Axis(NamedTuple):
    """The constant matrices of one axis, for each of e experts and t tiles of h tokens.

    Attributes:
        tokens: which tokens a tile reads, margins included [t, g].
        rows: all R_u side by side [e, t, m h, 3 g].
        cols: all R_u one below the other [e, t, 3 m h, g].
        points: D [e, t, m, h].
    """

    tokens: Tensor
    rows: Tensor
    cols: Tensor
    points: Tensor


class ConvExperts(nn.Module):
    """One 3 x 3 convolution per scale; each map passes through the experts that its gate chose.

    Always computes in float32. Keeps r + m^2 r numbers per token and chosen expert for the backward pass: the
    tokens and what enters the activation, 51 for bicubic experts of rank r = 3. Shapes do not depend on the
    routing, nothing waits for the device, and every parameter receives a gradient, be it zero.

    Args:
        channels: r, of the maps.
        scales: of the experts, positive; below 1 they see a coarser grid.
        activation: `gelu` as in the released code, `identity` as in the paper's equation.
        interpolation: to the grid of a scale and back; to a coarser one areas are averaged.
    """

    def __init__(
        self,
        channels: int,
        scales: Sequence[float],
        activation: Activation = "gelu",
        interpolation: Interpolation = "bicubic",
    ):
        super().__init__()
        self.scales = tuple(scales)
        self.activation = activation
        self.interpolation = interpolation
        self.weight = nn.Parameter(torch.empty(len(self.scales), channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(len(self.scales), channels))
        for weight in self.weight:  # as PyTorch initialises one convolution
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, z: Tensor, choice: Tensor, gates: Tensor) -> Tensor:
        """Return sum_k gates[:, k] E_choice[:, k](z).

        Args:
            z: maps [n, h, w, r].
            choice: indices of the experts [n, k].
            gates: their weights [n, k].
        """
        n, h, w, r = z.shape
        k = choice.shape[1]
        kind = (self.scales, self.interpolation, self.activation)
        with without_autocast(z.device):
            y, x = axis_of(h, *kind, z.device), axis_of(w, *kind, z.device)
            tiles = cut(z.float()[:, None].expand(-1, k, -1, -1, -1).flatten(0, 1), y, x)
            places = tiles.shape[0] // (n * k)  # an export would take len() for a fixed number
            weight, bias = self.weight.float(), self.bias.float()
            out = RoutedExperts.apply(tiles, weight, bias, choice.flatten().repeat(places), (h, w), *kind)
            maps = paste(out, y, x).view(n, k, h, w, r)
            mixed: Tensor = (maps * gates.float().view(n, k, 1, 1, 1)).sum(dim=1)
        return mixed.to(z.dtype)


class RoutedExperts(torch.autograd.Function):
    """Each tile's own expert; the names are the module docstring's."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        choice: Tensor,
        size: tuple[int, int],
        scales: tuple[float, ...],
        interpolation: Interpolation,
        activation: Activation,
    ) -> Tensor:
        """Return the tiles without their margins [n, h, w, r].

        Args:
            ctx: for the backward pass.
            z: tiles as `cut` makes them [n, h + margins, w + margins, r].
            weight: of the experts [e, r, r, 3, 3].
            bias: of the experts [e, r].
            choice: expert of each tile [n].
            size: height and width of the maps that were cut.
            scales: of the experts.
            interpolation: to the grid of a scale and back.
            activation: between convolution and down-sampling.
        """
        kind = (scales, interpolation, activation)
        rows, row_points, cols, col_points = gather_tables(choice, size, kind)
        (n, m, h), w, r = row_points.shape, col_points.shape[2], z.shape[3]
        convolved = torch.bmm(kernels(weight, choice), sample_columns(z, cols))
        convolved = convolved.view(n, 3, r, -1, m * w).transpose(2, 3).reshape(n, -1, r * m * w)
        before = torch.bmm(rows, convolved).view(n, m, h, r, m, w)
        before += bias[choice][:, None, None, :, None, None]
        after = F.gelu(before) if activation == "gelu" else before
        if m > 1:
            after = (after * row_points[..., None, None, None]).sum(dim=1)
            after = (after * col_points[:, None, None]).sum(dim=3)
        ctx.size, ctx.kind = size, kind
        ctx.save_for_backward(z, weight, choice, before)
        return after.reshape(n, h, r, w).transpose(2, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of z, weight and bias; the columns are sampled again."""
        z, weight, choice, before = ctx.saved_tensors
        n, m, h, r, _, w = before.shape
        with without_autocast(z.device):
            rows, row_points, cols, col_points = gather_tables(choice, ctx.size, ctx.kind)
            d = grad.transpose(2, 3).reshape(n, 1, h, r, 1, w)
            if m > 1:
                d = d * col_points[:, None, None, None] * row_points[..., None, None, None]
            if ctx.kind[2] == "gelu":
                d = torch.ops.aten.gelu_backward(d, before)
            d_convolved = torch.bmm(rows.transpose(1, 2), d.reshape(n, m * h, r * m * w))
            d_convolved = d_convolved.view(n, 3, -1, r, m * w).transpose(2, 3).reshape(n, 3 * r, -1)
            d_kernels = torch.bmm(d_convolved, sample_columns(z, cols).transpose(1, 2))
            d_columns = torch.bmm(kernels(weight, choice).transpose(1, 2), d_convolved)
            d_columns = d_columns.view(n, r, 3, -1, m * w).transpose(2, 3).reshape(n, -1, 3 * m * w)
            d_z = torch.bmm(d_columns, cols).view(n, r, *z.shape[1:3]).permute(0, 2, 3, 1)
            # a product with the routing sums over tiles in a fixed order, unlike a scatter on a GPU
            routing = (choice == torch.arange(len(weight), device=z.device)[:, None]).to(z.dtype)
            d_weight = (routing @ d_kernels.flatten(1)).view(-1, 3, r, r, 3).permute(0, 2, 3, 1, 4)
            d_bias = routing @ d.sum(dim=(1, 2, 4, 5))
        return d_z, d_weight, d_bias, None, None, None, None, None


def cut(z: Tensor, y: Axis, x: Axis) -> Tensor:
    """Cut maps [n, h, w, r] into overlapping tiles, those of the same place side by side."""
    if len(y.tokens) == len(x.tokens) == 1:
        return z
    tiles = z.index_select(1, y.tokens.flatten()).index_select(2, x.tokens.flatten())
    tiles = tiles.view(z.shape[0], *y.tokens.shape, *x.tokens.shape, -1)
    return tiles.permute(1, 3, 0, 2, 4, 5).flatten(0, 2)


def paste(tiles: Tensor, y: Axis, x: Axis) -> Tensor:
    """Put tiles without margins together to maps."""
    if len(y.tokens) == len(x.tokens) == 1:
        return tiles
    _, h, w, r = tiles.shape
    grid = tiles.view(len(y.tokens), len(x.tokens), -1, h, w, r).permute(2, 0, 3, 1, 4, 5)
    return grid.reshape(-1, len(y.tokens) * h, len(x.tokens) * w, r)


def gather_tables(choice: Tensor, size: tuple[int, int], kind: Kind) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return R, D, C and D' of each tile, by its expert and its place in the map."""
    y, x = (axis_of(side, *kind, choice.device) for side in size)
    places = len(y.tokens) * len(x.tokens)
    place = torch.arange(choice.shape[0], device=choice.device) // (choice.shape[0] // places)
    row, col = place // len(x.tokens), place % len(x.tokens)
    return y.rows[choice, row], y.points[choice, row], x.cols[choice, col], x.points[choice, col]


def sample_columns(z: Tensor, cols: Tensor) -> Tensor:
    """Return z C_v^T for all v: [n, (i v), (h m w)] from maps [n, h, w, r] and `cols` [n, 3 m w, w]."""
    n, h, w, r = z.shape
    sampled = torch.bmm(z.permute(0, 3, 1, 2).reshape(n, r * h, w), cols.transpose(1, 2))
    return sampled.view(n, r, h, 3, -1).transpose(2, 3).reshape(n, r * 3, -1)


def kernels(weight: Tensor, choice: Tensor) -> Tensor:
    """Return each map's convolution as a matrix [n, (u o), (i v)]."""
    r = weight.shape[1]
    return weight[choice].permute(0, 3, 1, 2, 4).reshape(-1, 3 * r, r * 3)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def axis_of(
    size: int,
    scales: tuple[float, ...],
    interpolation: Interpolation,
    activation: Activation,
    device: torch.device,
) -> Axis:
    """Return the matrices of an axis of `size` tokens, made once."""
    return _read_off(size, scales, interpolation, activation, device)


@cache
def _read_off(
    size: int,
    scales: tuple[float, ...],
    interpolation: Interpolation,
    activation: Activation,
    device: torch.device,
) -> Axis:
    """Read the matrices off PyTorch's own resampling."""
    linear = activation == "identity"
    m = 1 if linear or all(scale % 2 == 1 for scale in scales) else POINTS[interpolation]
    samples, points = [], []
    # kept for training, wherever they are made, also where tensors have no data while a step is followed
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        for scale in scales:
            grid = grid_size(size, scale)
            read = 1 if scale % 2 == 1 else POINTS[interpolation]
            kept = read if linear else m
            # below the centre of each token, (i + 1/2) g / h - 1/2, in whole numbers
            below = ((2 * torch.arange(size) + 1) * grid - size) // (2 * size)
            fine = (below - (read - 1) // 2)[:, None] + torch.arange(-1, kept + 1)
            inside = (fine >= 0) & (fine < grid)
            fine = fine.clamp(0, grid - 1)
            down = resampling(grid, size, interpolation)
            d = down.gather(1, fine[:, 1:-1]) * inside[:, 1:-1]
            up = resampling(size, grid, "area" if scale < 1 else interpolation)[fine] * inside[..., None]
            r = torch.stack([up[:, u : u + kept] for u in range(3)])  # [3, size, kept, size]
            r *= (d != 0)[..., None]  # what is not read has no reach
            if linear:
                r, d = (d[..., None] * r).sum(dim=2, keepdim=True), torch.ones_like(d[:, :1])
            samples.append(r.transpose(1, 2))
            points.append(d.T)
        whole = torch.stack(samples)  # [e, 3, m, size, size]
        own, other = whole.any(dim=0).flatten(0, 1).any(dim=0).nonzero().T
        reach = int((own - other).abs().max())
        h = tile_length(size, reach)
        margin = reach if h < size else 0
        tokens = torch.arange(0, size, h)[:, None] + torch.arange(-margin, h + margin)
        inside = (tokens >= 0) & (tokens < size)
        tokens = tokens.clamp(0, size - 1)
        whole = whole.view(len(scales), 3, -1, len(tokens), h, size)
        index = tokens[:, None].expand(*whole.shape[:3], -1, h, -1)
        tiled = (whole.gather(5, index) * inside[:, None]).float().to(device)
        return Axis(
            tokens.to(device),
            tiled.permute(0, 3, 2, 4, 1, 5).flatten(4).flatten(2, 3),
            tiled.permute(0, 3, 1, 2, 4, 5).flatten(2, 4),
            torch.stack(points).view(len(scales), -1, len(tokens), h).transpose(1, 2).float().to(device),
        )


def tile_length(size: int, reach: int) -> int:
    """Return how long a tile is: an axis is cut where tiles are much shorter with their margins, too.

    Args:
        size: of the axis, in tokens.
        reach: tokens that an output reads beyond its own.
    """
    lengths = range(TILE, max(TILE // 2, 2 * reach), -1)
    return size if size <= 2 * TILE else next((each for each in lengths if size % each == 0), size)


def grid_size(size: int, scale: float) -> int:
    """Return how many points an axis of `size` tokens has at a scale; rounding adds none."""
    return max(1, math.ceil(round(scale * size, 6)))


def resampling(size: int, to: int, mode: Interpolation | Literal["area"]) -> Tensor:
    """Return the matrix [to, size] that resamples one axis."""
    each = torch.eye(size, dtype=torch.float64).view(1, size, size, 1)
    return F.interpolate(each, size=(to, 1), mode=mode)[0, :, :, 0].T
