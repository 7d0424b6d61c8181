"""The released form of what the library computes otherwise: reference in tests, rival in benchmarks."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

from convlora import IGNORED
from convlora.peft.conv_experts import ConvExperts
from convlora.sam.attention import RelPosAttention
from convlora.sam.tiny_vit import TinyViTEncoder, WindowAttention
from convlora.set_loss import SetLoss


class LiteralExperts(nn.Module):
    """The experts as they are defined, on the grid of their scale; one after another, each on the maps that
    chose it.

    Args:
        experts: whose parameters and settings are used.
    """

    def __init__(self, experts: ConvExperts):
        super().__init__()
        self.weight = experts.weight
        self.bias = experts.bias
        self.scales = experts.scales
        self.activation = experts.activation
        self.interpolation = experts.interpolation

    def forward(self, z: Tensor, choice: Tensor, gates: Tensor) -> Tensor:
        maps = z.permute(0, 3, 1, 2)
        mixed = torch.zeros_like(maps)
        for index in range(len(self.scales)):
            rows, ranks = (choice == index).nonzero(as_tuple=True)
            if len(rows):
                out = self.expert(index, maps[rows]) * gates[rows, ranks, None, None, None].to(maps.dtype)
                mixed = mixed.index_add(0, rows, out.to(mixed.dtype))
        return mixed.permute(0, 2, 3, 1)

    def expert(self, index: int, maps: Tensor) -> Tensor:
        """Apply one expert to maps [n, channels, h, w]."""
        mode, size, scale = self.interpolation, maps.shape[2:], self.scales[index]
        grid = [math.ceil(scale * side) for side in size]
        fine = F.interpolate(maps, size=grid, mode="area" if scale < 1 else mode)
        fine = F.conv2d(fine, self.weight[index], self.bias[index], padding=1)
        return F.interpolate(F.gelu(fine) if self.activation == "gelu" else fine, size=size, mode=mode)


class ReleasedLoRALinear(nn.Module):
    """AutoGluon's linear layer with Conv-LoRA, or LoRA where it has no experts, under its own names.

    Args:
        linear: the frozen layer; its parts are taken over.
        rank: of the update.
        alpha: its scale, in units of the rank.
        num_experts: at scales 1 to `num_experts`.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, num_experts: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, rank))
        self.scaling = alpha / rank
        if num_experts:
            self.lora_moe_gating = ReleasedGate(rank, num_experts)
            convs = (nn.Conv2d(rank, rank, 3, padding=1) for _ in range(num_experts))
            self.lora_moe_experts = nn.ModuleList(nn.Sequential(conv, nn.GELU()) for conv in convs)

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.lora_A.T
        if hasattr(self, "lora_moe_experts"):
            maps = z.permute(0, 3, 1, 2)
            choice = self.lora_moe_gating(maps)
            mixed = [self.expert(int(index), each[None]) for index, each in zip(choice, maps, strict=True)]
            z = z + torch.cat(mixed).permute(0, 2, 3, 1)
        return F.linear(x, self.weight, self.bias) + self.scaling * z @ self.lora_B.T

    def expert(self, index: int, maps: Tensor) -> Tensor:
        """Apply one expert to maps [n, rank, h, w]."""
        fine = F.interpolate(maps, scale_factor=index + 1, mode="bicubic")
        return F.interpolate(self.lora_moe_experts[index](fine), size=maps.shape[2:], mode="bicubic")


class ReleasedGate(nn.Module):
    """AutoGluon's gate as it chooses after training; returns the index of each map's expert."""

    def __init__(self, rank: int, num_experts: int):
        super().__init__()
        self.w_gate = nn.Parameter(torch.empty(rank, num_experts))
        self.w_noise = nn.Parameter(torch.empty(rank, num_experts))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))

    def forward(self, maps: Tensor) -> Tensor:
        return (maps.mean(dim=(2, 3)) @ self.w_gate).argmax(dim=1)


def literal_set_loss(
    classes: Tensor, masks: Tensor, ids: Tensor, loss: SetLoss, class_weights: Sequence[float] | None = None
) -> Tensor:
    """Mask2Former's loss over all pixels, image by image, the matching by trying every one.

    Args:
        classes: logits [n, q, c + 1].
        masks: logits [n, q, h, w].
        ids: of the classes [n, h, w].
        loss: whose weights are used.
        class_weights: of the classes.
    """
    images = []
    for logits, found, mask in zip(classes, masks, ids.long(), strict=True):
        valid = mask != IGNORED
        pixels = found[:, valid]
        kinds = sorted(set(mask[valid].tolist()))
        if not kinds:
            images.append(torch.zeros(3))
            continue
        number = len(logits[0]) - 1
        weights = torch.tensor([*(class_weights or [1.0] * number), loss.no_class_weight])
        targets = [(mask[valid] == kind).float() for kind in kinds]

        def terms(query: int, index: int) -> Tensor:
            probs, target = pixels[query].sigmoid(), targets[index]  # noqa: B023
            dice = 1 - (2 * (probs * target).sum() + 1) / (probs.sum() + target.sum() + 1)
            return torch.stack([F.binary_cross_entropy_with_logits(pixels[query], target), dice])  # noqa: B023

        def cost(queries: tuple[int, ...]) -> float:
            total = 0.0
            for index, query in enumerate(queries):
                parts = torch.cat([-logits[query].softmax(0)[kinds[index]][None], terms(query, index)])  # noqa: B023
                total += float(torch.tensor(loss.costs).float() @ parts)
            return total

        best = min(itertools.permutations(range(len(logits)), len(kinds)), key=cost)
        target = torch.full((len(logits),), number)
        target[list(best)] = torch.tensor(kinds)
        entropy = F.cross_entropy(logits, target, weight=weights)
        matched = torch.stack([terms(query, index) for index, query in enumerate(best)])
        own = weights[kinds][:, None]
        images.append(torch.cat([entropy[None], (own * matched).sum(0) / own.sum()]))
    return torch.stack(images).mean(0) @ torch.tensor(loss.weights).float()


class EagerWindowAttention(nn.Module):
    """MobileSAM's attention of a window, with its matrix; parts as of the library's module."""

    def __init__(self, attention: WindowAttention):
        super().__init__()
        self.num_heads = attention.num_heads
        self.norm = attention.norm
        self.qkv = attention.qkv
        self.proj = attention.proj
        self.attention_biases = attention.attention_biases
        self.register_buffer("attention_bias_idxs", attention.attention_bias_idxs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, l, c = x.shape  # noqa: E741
        q, k, v = self.qkv(self.norm(x)).view(n, l, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        scores = scores + self.attention_biases[:, self.attention_bias_idxs]
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, l, c))


def unfolded_norm(folded: nn.Conv2d) -> nn.Module:
    """MobileSAM's pair of a convolution and its batch norm; neck and mask decoder have none."""
    if folded.bias is None:
        return folded
    norm = nn.BatchNorm2d(folded.out_channels, eps=0).requires_grad_(False).eval()
    norm.bias.data = folded.bias.data
    folded.bias = None
    return nn.Sequential(folded, norm)


def eager_attention(attention: RelPosAttention) -> Attention:
    """segment-anything's own module around the same parts."""
    size = [(len(table) + 1) // 2 for table in (attention.rel_pos_h, attention.rel_pos_w)]
    dim = attention.proj.in_features
    with torch.device("meta"):
        eager = Attention(dim, attention.num_heads, use_rel_pos=True, input_size=tuple(size))
    eager.qkv, eager.proj = attention.qkv, attention.proj
    eager.rel_pos_h, eager.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w
    return eager


def as_released(encoder: nn.Module) -> nn.Module:
    """Turn an encoder, in place, into the released form of the same function."""
    swaps: dict[type[nn.Module], Callable[..., nn.Module]] = {
        ConvExperts: LiteralExperts,
        RelPosAttention: eager_attention,
        WindowAttention: EagerWindowAttention,
    }
    if isinstance(encoder, TinyViTEncoder):
        swaps[nn.Conv2d] = unfolded_norm
    for name, module in list(encoder.named_modules()):
        if type(module) in swaps:
            encoder.set_submodule(name, swaps[type(module)](encoder.get_submodule(name)))
    return encoder
