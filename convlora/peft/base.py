"""What every fine-tuning method shares: the protocol, the replacement of linear layers, auxiliary losses."""

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
    encoder: nn.Module, targets: Sequence[str], adapt: Callable[[nn.Linear], nn.Module]
) -> None:
    """Replace every linear layer that a target names by `adapt(layer)`.

    Args:
        encoder: changed in place.
        targets: the last parts of module names: `qkv` is the fused projection of every block,
            `blocks.0.attn.qkv` that of the first.
        adapt: makes the adapted layer, which keeps the frozen one.

    Raises:
        ValueError: there are no targets, or one names no linear layer.
    """
    linears = {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    if not targets:
        raise ValueError(
            "peft.targets is empty, so nothing would be adapted; peft=decoder_only says that outright"
        )
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


def aux_loss(module: nn.Module) -> Tensor | None:
    """Sum the auxiliary losses that the layers of `module` recorded in their last forward pass.

    Returns:
        A scalar, or None where no layer records any.
    """
    losses = [layer.aux_loss for layer in module.modules() if isinstance(layer, HasAuxLoss)]
    return torch.stack(losses).sum() if losses else None


class HasAuxLoss(nn.Module):
    """A layer that records a scalar loss of its own in every forward pass.

    Attributes:
        aux_loss: of the last forward pass, with its graph.
    """

    aux_loss: Tensor
