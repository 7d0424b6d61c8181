"""SAM's attention with decomposed relative positions, without keeping a matrix of all pairs of tokens.

The score of query q at (y, x) and key k at (y', x') is scale q.k + q.R_h[y, y'] + q.R_w[x, x'], where R_h
and R_w hold the learnt embeddings of the offsets between rows and between columns (Li et al., "MViTv2", CVPR
2022, arXiv:2112.01526). The two terms beside the first are small: [tokens, rows] and [tokens, columns].
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

# Scores held at a time on a CPU: few enough for its caches, enough for its matrix products.
TILE = 2**21


class RelPosAttention(nn.Module):
    """Attention over a grid of tokens [n, h, w, c]; same function and parameter names as segment-anything's.

    Args:
        attention: segment-anything's module with relative positions; its parts are taken over.
    """

    row_table: Tensor
    col_table: Tensor

    def __init__(self, attention: Attention):
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.rel_pos_h = attention.rel_pos_h
        self.rel_pos_w = attention.rel_pos_w
        self.register_buffer("row_table", None, persistent=False)
        self.register_buffer("col_table", None, persistent=False)
        self.prepare()
        self.register_load_state_dict_post_hook(_prepare_again)  # type: ignore[no-untyped-call]

    def prepare(self) -> None:
        """Spread the embeddings of offsets over pairs of rows and columns; again after weights are loaded."""
        self.row_table = offset_table(self.rel_pos_h.detach(), (len(self.rel_pos_h) + 1) // 2)
        self.col_table = offset_table(self.rel_pos_w.detach(), (len(self.rel_pos_w) + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, h, w, c] to [n, h, w, c]; other sizes than the built one resample the offsets."""
        n, h, w, _ = x.shape
        qkv = self.qkv(x).reshape(n, h, w, 3, self.num_heads, -1).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv.flatten(1, 2).unbind()  # [n heads, h, w, d]
        attended = attend(q, k, v, *self._tables(h, w, q.dtype))
        attended = attended.view(n, self.num_heads, h, w, -1).permute(0, 2, 3, 1, 4).flatten(3)
        out: Tensor = self.proj(attended)
        return out

    def with_prompts(self, x: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Let tokens [n, h, w, c] and prompts [n, p, c], which have no position, attend to all of both."""
        n, h, w, _ = x.shape
        tokens = torch.cat([x.flatten(1, 2), prompts], dim=1)
        length = tokens.shape[1]
        qkv = self.qkv(tokens).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.flatten(1, 2).unbind()  # [n heads, h w + p, d]
        padding = flash_padding(q.shape[-1] + h + w, compute_capability(q.device))
        attended = prompted_attention(q, k, v, *self._tables(h, w, q.dtype), padding)
        attended = attended.reshape(n, self.num_heads, length, -1).transpose(1, 2).flatten(2)
        out = self.proj(attended)
        return out[:, : h * w].view(x.shape), out[:, h * w :]

    def _tables(self, h: int, w: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        row_table = self._table(self.rel_pos_h, self.row_table, h)
        col_table = self._table(self.rel_pos_w, self.col_table, w)
        return row_table.to(dtype), col_table.to(dtype)

    def _table(self, rel_pos: Tensor, prepared: Tensor, size: int) -> Tensor:
        if rel_pos.requires_grad or len(prepared) != size:
            return offset_table(rel_pos, size)
        return prepared


def _prepare_again(module: RelPosAttention, _: object) -> None:
    module.prepare()


def attend(q: Tensor, k: Tensor, v: Tensor, row_table: Tensor, col_table: Tensor) -> Tensor:
    """Let queries attend to all keys with relative positions, in the way that suits the device.

    Args:
        q: queries [n, h, w, d].
        k: keys [n, h, w, d].
        v: values [n, h, w, d].
        row_table: embedding of the offset between each two rows [h, h, d].
        col_table: embedding of the offset between each two columns [w, w, d].

    Returns:
        What the queries attend to, [n, h, w, d].
    """
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        return tiled_attention(q, k, v, row_table, col_table)
    padding = flash_padding(q.shape[-1] + len(row_table) + len(col_table), compute_capability(q.device))
    return folded_attention(q, k, v, row_table, col_table, padding)


def flash_padding(width: int, capability: tuple[int, int]) -> int:
    """Return how many columns a head needs besides its own so that flash attention has a backward pass.

    The consumer GPUs of the compute capabilities 8.6 to 8.9 and 12.x have too little shared memory for that
    of widths 193 to 224; the next multiple of 8 takes another kernel. ViT-H's at 1024 pixels is 208.
    """
    refused = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    return 232 - width if refused and 192 < width <= 224 else 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, of other devices (0, 0)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def relative_scores(q: Tensor, row_table: Tensor, col_table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score of queries [n, y, w, d] with each row [n, y, w, h] and each column [n, y, w, w]."""
    return torch.einsum("nywc,yhc->nywh", q, row_table), torch.einsum("nywc,wxc->nywx", q, col_table)


def folded_attention(
    q: Tensor, k: Tensor, v: Tensor, row_table: Tensor, col_table: Tensor, padding: int = 0
) -> Tensor:
    """Compute `attend` by a fused kernel, with one product for all three terms.

    [scale q, rel_h, rel_w] . [k, onehot(y'), onehot(x')] is the score; `padding` zeros follow on both sides.
    The values are padded to the same width, which flash kernels demand.
    """
    h, w, d = q.shape[1:]
    folded = fold(q, k, row_table, col_table, padding)
    attended = fused_attention(*folded, F.pad(v, (0, h + w + padding)).flatten(1, 2))
    return attended[..., :d].unflatten(1, (h, w))  # type: ignore[no-untyped-call, no-any-return]


def prompted_attention(
    q: Tensor, k: Tensor, v: Tensor, row_table: Tensor, col_table: Tensor, padding: int = 0
) -> Tensor:
    """Compute `folded_attention` of a grid with prompts, whose scores are scale q.k alone.

    Args:
        q: queries [n, h w + p, d], those of the prompts last; keys and values likewise.
        k: keys.
        v: values.
        row_table: embedding of the offset between each two rows [h, h, d].
        col_table: embedding of the offset between each two columns [w, w, d].
        padding: zeros behind the product.

    Returns:
        What the queries attend to, [n, h w + p, d].
    """
    h, w, d = len(row_table), len(col_table), q.shape[-1]
    q_grid, k_grid = (t[:, : h * w].reshape(-1, h, w, d) for t in (q, k))
    folded = fold(q_grid, k_grid, row_table, col_table, padding)
    beside = (F.pad(t[:, h * w :], (0, h + w + padding)) for t in (q * d**-0.5, k))
    q, k = (torch.cat(pair, dim=1) for pair in zip(folded, beside, strict=True))
    return fused_attention(q, k, F.pad(v, (0, h + w + padding)))[..., :d]


def fold(
    q: Tensor, k: Tensor, row_table: Tensor, col_table: Tensor, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the queries and keys of the one product, [n, y w, d + h + w + padding] and [n, h w, the same].

    Args:
        q: queries of some rows [n, y, w, d].
        k: keys [n, h, w, d].
        row_table: embedding of the offset between these rows and all [y, h, d].
        col_table: embedding of the offset between each two columns [w, w, d].
        padding: zeros behind the product.
    """
    n, h, w, d = k.shape
    position = [t.to(k.dtype).expand(n, -1, -1, -1) for t in position_of_keys(h, w, k.device)]
    zeros = k.new_zeros(n, h, w, padding)
    rel_h, rel_w = relative_scores(q, row_table, col_table)
    q = torch.cat([q * d**-0.5, rel_h, rel_w, zeros[:, : q.shape[1]]], dim=-1)
    k = torch.cat([k, *position, zeros], dim=-1)
    return q.flatten(1, 2), k.flatten(1, 2)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by products that are scaled already, [n, l, d]."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0)[0]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def position_of_keys(h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row [h, w, h] and the column [h, w, w] of each token as one-hot vectors, made once."""
    with _disable_current_modes():  # kept with its numbers, also where a step is followed that has none
        return _position_of_keys(h, w, device)


@cache
def _position_of_keys(h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # kept for training, wherever it is made
        row, col = torch.eye(h, device=device), torch.eye(w, device=device)
        return row[:, None].expand(h, w, h).contiguous(), col.expand(h, w, w).contiguous()


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, row_table: Tensor, col_table: Tensor) -> Tensor:
    """Compute `attend` tile by tile of scores, which the backward pass computes again.

    On a CPU this is faster than the fused kernel, whose product above is 2 to 3 times as wide as the queries.
    """
    _, h, w, _ = q.shape
    rows = max(1, min(h, TILE // (h * w * w)))
    heads = max(1, TILE // (rows * w * h * w))
    strips = []
    # split, unlike slices, puts the gradients of the parts together at once
    for strip, k_strip, v_strip in zip(*(torch.split(t, heads) for t in (q, k, v)), strict=True):
        tiles = zip(torch.split(strip, rows, dim=1), torch.split(row_table, rows), strict=True)
        done = [Tile.apply(tile, k_strip, v_strip, table, col_table) for tile, table in tiles]
        strips.append(torch.cat(done, dim=1))
    return torch.cat(strips)


def is_narrow(q: Tensor) -> bool:
    """Whether rows of queries [n, y, w, d] are too short for a CPU's vectors, of 32 bfloat16.

    Sums over such rows, and terms added along them, then take longer than the wider product of `fold`.
    """
    return q.dtype == torch.bfloat16 and q.shape[2] < 32


class Tile(torch.autograd.Function):
    """`attend` for some rows of queries; keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row_table: Tensor, col_table: Tensor) -> Tensor:
        """Return what the queries [n, y, w, d] attend to; `row_table` is that of their rows [y, h, d]."""
        ctx.save_for_backward(q, k, v, row_table, col_table)
        return torch.bmm(Tile.weights(q, k, row_table, col_table), v.flatten(1, 2)).view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, row_table, col_table = ctx.saved_tensors
        n, y, w, d = q.shape
        flat = grad.reshape(n, y * w, d)
        weights = Tile.weights(q, k, row_table, col_table)
        d_v = torch.bmm(weights.transpose(1, 2), flat).view(v.shape)
        d_weights = torch.bmm(flat, v.flatten(1, 2).transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        if is_narrow(q):
            _, folded = fold(q, k, row_table, col_table)
            d_folded = torch.bmm(d_scores, folded).view(n, y, w, -1)
            d_q, d_rel_h, d_rel_w = torch.split(d_folded, [d, *k.shape[1:3]], dim=-1)
            d_q = d_q * d**-0.5
        else:
            grid = d_scores.view(n, y, w, *k.shape[1:3])
            d_rel_h, d_rel_w = grid.sum(dim=4), grid.sum(dim=3)
            d_q = torch.bmm(d_scores, k.flatten(1, 2)).view(q.shape) * d**-0.5
        d_q += torch.einsum("nywh,yhc->nywc", d_rel_h, row_table)
        d_q += torch.einsum("nywx,wxc->nywc", d_rel_w, col_table)
        d_k = torch.bmm(d_scores.transpose(1, 2), q.flatten(1, 2) * d**-0.5).view(k.shape)
        d_row_table = torch.einsum("nywh,nywc->yhc", d_rel_h, q) if ctx.needs_input_grad[3] else None
        d_col_table = torch.einsum("nywx,nywc->wxc", d_rel_w, q) if ctx.needs_input_grad[4] else None
        return d_q, d_k, d_v, d_row_table, d_col_table

    @staticmethod
    def weights(q: Tensor, k: Tensor, row_table: Tensor, col_table: Tensor) -> Tensor:
        """Return the softmax of the scores [n, y w, h w]."""
        if is_narrow(q):
            q, k = fold(q, k, row_table, col_table)
            return torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
        n, y, w, d = q.shape
        rel_h, rel_w = relative_scores(q, row_table, col_table)
        scores = torch.bmm(q.flatten(1, 2) * d**-0.5, k.flatten(1, 2).transpose(1, 2))
        grid = scores.view(n, y, w, *k.shape[1:3])
        grid += rel_h[..., None]
        grid += rel_w[..., None, :]
        return scores.softmax(dim=-1)


def offset_table(rel_pos: Tensor, size: int) -> Tensor:
    """Return the embedding of the offset between each two of `size` positions, [size, size, d].

    Args:
        rel_pos: embeddings of the offsets 1 - s to s - 1, learnt for s positions, [2 s - 1, d].
        size: number of positions.
    """
    position = torch.arange(size, device=rel_pos.device)
    return resample_offsets(rel_pos, 2 * size - 1)[position[:, None] - position + size - 1]


def resample_offsets(table: Tensor, length: int) -> Tensor:
    """Resample relative position embeddings [offsets, c] to [length, c], linear as segment-anything does."""
    if len(table) == length:
        return table
    return F.interpolate(table.T[None], size=length, mode="linear")[0].T
