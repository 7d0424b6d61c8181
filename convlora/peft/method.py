"""What fine-tuning methods share: the recipe, adapted layers, the replacement of linear layers and blocks."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

# What encoders are made of beside tables of positions; batch norms are folded into their convolutions
NORMS = (nn.LayerNorm, LayerNorm2d)
LAYERS = (nn.Linear, nn.Conv2d, *NORMS)

# Linear layers of a transformer block by what they do, for encoders whose authors named them otherwise
ROLES = {"mlp_in": ("mlp.lin1", "mlp.fc1"), "mlp_out": ("mlp.lin2", "mlp.fc2")}


class Method(ABC):
    """A recipe that adapts an image encoder."""

    width: ClassVar[str | None] = None
    """The setting by which the number of trained parameters grows; None where there is none."""

    starts_frozen: ClassVar[bool] = True
    """Whether the adapted encoder starts as the equal of the frozen one."""

    @abstractmethod
    def inject(self, encoder: nn.Module) -> nn.Module:
        """Adapt a frozen encoder in place and return it.

        What the method creates is trainable by construction. A method may also free tensors that the encoder
        has, which it chooses by the kind of their module; nothing is chosen by a parameter's name.

        Raises:
            ValueError: this encoder has no place for it.
        """


class Adapted(nn.Module):
    """What stands in the place of a frozen part of the encoder.

    Attributes:
        base: the frozen part.
        rates: learning rates of parameters by name, as multiples of the others'; those left out are 1.
    """

    base: nn.Module
    rates: Mapping[str, float] = MappingProxyType({})

    def merged(self) -> nn.Module:
        """Return a part of the frozen one's own kind that computes the same.

        Raises:
            ValueError: no such part can.
        """
        raise ValueError(
            f"what {type(self).__name__} computes does not fit into the weights of the layer that it adapts; "
            "use the adapter beside the base weights"
        )


def merge(encoder: nn.Module) -> nn.Module:
    """Return a copy of an adapted encoder as a plain one whose weights hold what was learnt.

    Raises:
        ValueError: a part of it cannot be merged.
    """
    encoder = copy.deepcopy(encoder)
    for name, module in list(encoder.named_modules()):
        if isinstance(module, Adapted):
            encoder.set_submodule(name, module.merged(), strict=True)
    encoder.load_state_dict(encoder.state_dict())  # for tables that attention makes of weights when they load
    return encoder


def transformer_blocks(encoder: nn.Module, indices: Sequence[int] | None = None) -> dict[str, nn.Module]:
    """Return transformer blocks, which have an `attn` and an `mlp`, by name.

    Args:
        encoder: frozen or adapted.
        indices: of those that are wanted, negative from the end; None for all.

    Raises:
        ValueError: `indices` is empty, or there is no such block.
    """
    names = {id(module): name for name, module in encoder.named_modules()}
    blocks: Any = encoder.blocks
    found = {names[id(block)]: block for block in blocks if hasattr(block, "attn") and hasattr(block, "mlp")}
    if indices is None:
        return found
    if not indices:
        raise ValueError("peft.blocks is empty, so nothing would be adapted; null adapts all blocks")
    for index in indices:
        if not -len(found) <= index < len(found):
            raise ValueError(
                f"peft.blocks: there is no block {index}; the image encoder has {len(found)}, "
                f"0 to {len(found) - 1}, or -1 for the last"
            )
    return {name: found[name] for name in (list(found)[index] for index in indices)}


@dataclass(frozen=True, kw_only=True)
class BlockMethod(Method):
    """A method whose parts stand in or beside transformer blocks; each has a width.

    Args:
        blocks: indices of the adapted blocks, negative from the end; None for all.
    """

    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.width is not None and getattr(self, self.width) < 1:
            raise ValueError(f"peft.{self.width}={getattr(self, self.width)} must be at least 1")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Make a context in which nothing is cast to half precision.

    An export computes in float32 anyway, and a program that is kept has no room for such a context.
    """
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(device.type, enabled=False)


def zeroed(linear: nn.Linear) -> nn.Linear:
    """Set a layer's weight and bias to zero, so that what it is added to starts as it was."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


@dataclass(frozen=True, kw_only=True)
class LinearMethod(Method):
    """A method that replaces linear layers; a subclass says by what.

    What lies before the first adapted block has nothing to learn, so autograd keeps nothing of it.

    Args:
        targets: which layers are adapted: `qkv`, the fused projection of the attention, `proj`, that of its
            output, `mlp_in` and `mlp_out` of every block of any encoder; or the last parts of names of the
            encoder at hand, as `blocks.0.attn.qkv`.
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
            prefixes = tuple(f"{name}." for name in transformer_blocks(encoder, self.blocks))
            linears = {name: module for name, module in linears.items() if name.startswith(prefixes)}
        for target in self.targets:
            if not any(_is_named(name, target) for name in linears):
                kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears} | ROLES.keys()))
                raise ValueError(
                    f"peft.targets: '{target}' names no linear layer of the image encoder; it has {kinds}"
                )
        for name, linear in linears.items():
            if any(_is_named(name, target) for target in self.targets):
                encoder.set_submodule(name, self.adapt(linear), strict=True)
        return encoder


def _is_named(name: str, target: str) -> bool:
    return f".{name}".endswith(tuple(f".{end}" for end in ROLES.get(target, (target,))))


def learning_rates(module: nn.Module) -> dict[str, float]:
    """Return the multiples of the learning rate that adapted layers ask for, by parameters' names."""
    return {
        f"{layer_name}.{name}".lstrip("."): multiple
        for layer_name, layer in module.named_modules()
        if isinstance(layer, Adapted)
        for name, multiple in layer.rates.items()
    }


def aux_loss(module: nn.Module, progress: float = 0.0) -> Tensor | None:
    """Sum the auxiliary losses that the layers of `module` recorded in their last training pass.

    Args:
        module: whose layers they are.
        progress: of the training, from 0 to 1, by which layers may weight their loss.

    Returns:
        A scalar, or None where no layer recorded any.
    """
    recorded = (layer for layer in module.modules() if isinstance(layer, HasAuxLoss))
    losses = [layer.aux_weight(progress) * layer.aux_loss for layer in recorded if hasattr(layer, "aux_loss")]
    return torch.stack(losses).sum() if losses else None


class HasAuxLoss(nn.Module):
    """A layer that records a scalar loss of its own in every forward pass of the training.

    Attributes:
        aux_loss: of the last such pass, with its graph; absent where there is none to record.
    """

    aux_loss: Tensor

    def aux_weight(self, progress: float) -> float:
        """Return what the loss is multiplied by when this share of the training is done."""
        return 1.0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the loss behind: a graph can be neither copied nor pickled."""
        return {key: value for key, value in self.__dict__.items() if key != "aux_loss"}
