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

TILE = (
    2**21
)  # scores held at a time on a CPU: small enough for its caches, large enough for its matrix products


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
        self.scale = attention.scale
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
        qkv = self.qkv(x).reshape(n, h * w, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.flatten(1, 2).unbind()  # [n heads, h w, d]
        grid = q.view(-1, h, w, q.shape[-1])
        rel_h = torch.einsum("nhwc,hkc->nhwk", grid, self._table(self.rel_pos_h, self.row_table, h))
        rel_w = torch.einsum("nhwc,wkc->nhwk", grid, self._table(self.rel_pos_w, self.col_table, w))
        attended = attend(q * self.scale, k, v, rel_h.flatten(1, 2), rel_w.flatten(1, 2))
        attended = attended.view(n, self.num_heads, h, w, -1).permute(0, 2, 3, 1, 4).flatten(3)
        out: Tensor = self.proj(attended)
        return out

    def _table(self, rel_pos: Tensor, prepared: Tensor, size: int) -> Tensor:
        if rel_pos.requires_grad or len(prepared) != size:
            return offset_table(rel_pos, size)
        return prepared


def _prepare_again(module: RelPosAttention, _: object) -> None:
    module.prepare()


def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Return softmax(q k^T + rel_h + rel_w) v, in the way that suits the device.

    Args:
        q: scaled queries [n, h w, d].
        k: keys [n, h w, d].
        v: values [n, h w, d].
        rel_h: score of each query with each row [n, h w, h].
        rel_w: score of each query with each column [n, h w, w].
    """
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        return tiled_attention(q, k, v, rel_h, rel_w)
    return folded_attention(q, k, v, rel_h, rel_w)


def folded_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Compute `attend` by a fused kernel, with one product for all three terms.

    [q, rel_h, rel_w] . [k, onehot(y'), onehot(x')] is the score. The values are padded to the same width,
    which flash kernels demand.
    """
    h, w, d = rel_h.shape[-1], rel_w.shape[-1], v.shape[-1]
    position = position_of_keys(h, w, k.device).to(k.dtype)
    q = torch.cat([q, rel_h, rel_w], dim=-1)
    k = torch.cat([k, position.expand(len(k), -1, -1)], dim=-1)
    v = F.pad(v, (0, h + w))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0)[0, ..., :d]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def position_of_keys(h: int, w: int, device: torch.device) -> Tensor:
    """Return each token's row and column as one-hot vectors side by side [h w, h + w], made once."""
    return _position_of_keys(h, w, device)


@cache
def _position_of_keys(h: int, w: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for training, wherever it is made
        row, col = torch.eye(h).repeat_interleave(w, dim=0), torch.eye(w).repeat(h, 1)
        return torch.cat([row, col], dim=1).to(device)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Compute `attend` tile by tile of scores, which the backward pass computes again.

    On a CPU this is faster than the fused kernel, whose product above is 2 to 3 times as wide as the queries.
    """
    tokens = q.shape[1]
    queries = max(1, min(tokens, TILE // tokens))
    heads = max(1, TILE // (queries * tokens))
    strips = []
    # split, unlike slices, puts the gradients of the parts together at once
    for q_strip, k_strip, v_strip, *rel in zip(
        *(torch.split(t, heads) for t in (q, k, v, rel_h, rel_w)), strict=True
    ):
        tiles = zip(*(torch.split(t, queries, dim=1) for t in (q_strip, *rel)), strict=True)
        strips.append(torch.cat([Tile.apply(i, k_strip, v_strip, *r) for i, *r in tiles], dim=1))
    return torch.cat(strips)


class Tile(torch.autograd.Function):
    """`attend` of some queries; keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """Return what the queries [n, l, d] attend to, [n, l, d]."""
        ctx.save_for_backward(q, k, v, rel_h, rel_w)
        return torch.bmm(Tile.weights(q, k, rel_h, rel_w), v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of all inputs."""
        q, k, v, rel_h, rel_w = ctx.saved_tensors
        weights = Tile.weights(q, k, rel_h, rel_w)
        d_v = torch.bmm(weights.transpose(1, 2), grad)
        d_weights = torch.bmm(grad, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_grid = d_scores.view(*rel_h.shape, rel_w.shape[2])
        d_q, d_k = torch.bmm(d_scores, k), torch.bmm(d_scores.transpose(1, 2), q)
        return d_q, d_k, d_v, d_grid.sum(dim=3), d_grid.sum(dim=2)

    @staticmethod
    def weights(q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """Return the softmax of the scores, [n, l, keys]."""
        scores = torch.bmm(q, k.transpose(1, 2))
        grid = scores.view(*rel_h.shape, rel_w.shape[2])
        grid += rel_h[..., None]
        grid += rel_w[:, :, None]
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
