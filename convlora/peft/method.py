"""What every fine-tuning method shares: the protocol, the replacement of linear layers, auxiliary losses."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Method(Protocol):
    """A recipe that adapts an image encoder."""

    def inject(self, encoder: nn.Module) -> nn.Module:
        """Adapt a frozen encoder in place and return it.

        What the method creates is trainable by construction; nothing is chosen by a parameter's name.
        """


@dataclass(frozen=True, kw_only=True)
class LinearMethod(ABC):
    """A method that replaces linear layers; a subclass says by what.

    What lies before the first adapted block has nothing to learn, so autograd keeps nothing of it.

    Args:
        targets: the last parts of the names of the adapted layers: `qkv` is the fused projection of every
            block, `blocks.0.attn.qkv` that of the first.
        blocks: where to look, as indices among the encoder's transformer blocks, negative from the end; None
            looks everywhere.
    """

    targets: Sequence[str] = ("qkv",)
    blocks: Sequence[int] | None = None

    @abstractmethod
    def adapt(self, layer: nn.Linear) -> nn.Module:
        """Return the layer in whose place it stands, which keeps it as `base` and starts as its equal."""

    def inject(self, encoder: nn.Module) -> nn.Module:
        """Replace every linear layer that a target names by `adapt(layer)`, in place; return the encoder.

        Raises:
            ValueError: no targets or blocks, no such block, or a target that names no linear layer there.
        """
        linears = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
        if not self.targets:
            raise ValueError(
                "peft.targets is empty, so nothing would be adapted; peft=decoder_only says that outright"
            )
        if self.blocks is not None:
            prefixes = _chosen_blocks(list(linears), self.blocks)
            linears = {name: module for name, module in linears.items() if _block(name) in prefixes}
        for target in self.targets:
            if not any(_is_named(name, target) for name in linears):
                kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears}))
                raise ValueError(
                    f"peft.targets: '{target}' names no linear layer of the image encoder; it has {kinds}"
                )
        for name, linear in linears.items():
            if any(_is_named(name, target) for target in self.targets):
                encoder.set_submodule(name, self.adapt(linear), strict=True)
        return encoder


def _is_named(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _chosen_blocks(names: Sequence[str], indices: Sequence[int]) -> list[str]:
    """Return the prefixes, such as `blocks.3.`, of the blocks at `indices`."""
    blocks = list(dict.fromkeys(block for name in names if (block := _block(name))))
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

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loss behind: a graph can be neither copied nor pickled."""
        return {key: value for key, value in self.__dict__.items() if key != "aux_loss"}
