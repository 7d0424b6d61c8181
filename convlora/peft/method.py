"""What every fine-tuning method shares: the protocol, the replacement of linear layers, auxiliary losses."""

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Method(Protocol):
    """A recipe that adapts an image encoder."""

    def inject(self, encoder: nn.Module) -> nn.Module:
        """Adapt a frozen encoder in place and return it.

        What the method creates is trainable by construction; nothing is chosen by a parameter's name.
        """


def replace_linears(
    encoder: nn.Module,
    targets: Sequence[str],
    blocks: Sequence[int] | None,
    adapt: Callable[[nn.Linear], nn.Module],
) -> None:
    """Replace every linear layer that a target names by `adapt(layer)`.

    What lies before the first adapted block has nothing to learn, so autograd keeps nothing of it.

    Args:
        encoder: changed in place.
        targets: the last parts of module names: `qkv` is the fused projection of every block,
            `blocks.0.attn.qkv` that of the first.
        blocks: where to look, as indices among the encoder's transformer blocks, negative from the end; None
            looks everywhere.
        adapt: makes the adapted layer, which keeps the frozen one.

    Raises:
        ValueError: there are no targets or blocks, no such block, or a target names no linear layer there.
    """
    linears = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    if not targets:
        raise ValueError(
            "peft.targets is empty, so nothing would be adapted; peft=decoder_only says that outright"
        )
    if blocks is not None:
        prefixes = _chosen_blocks(list(linears), blocks)
        linears = {name: module for name, module in linears.items() if _block(name) in prefixes}
    for target in targets:
        if not any(_is_named(name, target) for name in linears):
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
            raise ValueError(
                f"peft.targets: '{target}' names no linear layer of the image encoder; it has {kinds}"
            )
    for name, linear in linears.items():
        if any(_is_named(name, target) for target in targets):
            encoder.set_submodule(name, adapt(linear), strict=True)


def _is_named(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _chosen_blocks(names: Sequence[str], indices: Sequence[int]) -> list[str]:
    """Return the prefixes, such as `blocks.3.`, of the blocks at `indices`."""
    blocks = list(dict.fromkeys(block for name in names if (block := _block(name))))
    if isinstance(indices, str) or not all(isinstance(index, int) for index in indices):
        raise ValueError(f"peft.blocks={indices} must list indices such as [0,1] or [-1], or be null for all")
    if not indices:
        raise ValueError("peft.blocks is empty, so nothing would be adapted; null adapts all blocks")
    for index in indices:
        if not -len(blocks) <= index < len(blocks):
            raise ValueError(
                f"peft.blocks: there is no block {index}; the image encoder has {len(blocks)}, "
                f"0 to {len(blocks) - 1}, or -1 for the last"
            )
    return [blocks[index] for index in indices]


def _block(name: str) -> str:
    """Return the part of a layer's name that names its transformer block; empty outside of blocks."""
    match = re.match(r"(.*\.)?blocks\.\d+\.", name)
    return match[0] if match else ""


def aux_loss(module: nn.Module) -> Tensor | None:
    """Sum the auxiliary losses that the layers of `module` recorded in their last training pass.

    Returns:
        A scalar, or None where no layer records any.
    """
    losses = [layer.aux_loss for layer in module.modules() if isinstance(layer, HasAuxLoss)]
    return torch.stack(losses).sum() if losses else None


class HasAuxLoss(nn.Module):
    """A layer that records a scalar loss of its own in every forward pass of the training.

    Attributes:
        aux_loss: of the last such pass, with its graph.
    """

    aux_loss: Tensor
