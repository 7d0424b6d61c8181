"""Methods that add nothing to the encoder and only choose which of its own tensors learn.

What was learnt lies in the encoder's own weights, so a merged encoder is the encoder itself.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from convlora.peft.method import LAYERS, NORMS, Method


class Selective(Method):
    """A method that frees tensors of the frozen encoder; a subclass chooses them."""

    @abstractmethod
    def choose(self, encoder: nn.Module) -> Iterable[nn.Parameter]:
        """Return the tensors of the encoder that are to learn."""

    def inject(self, encoder: nn.Module) -> nn.Module:
        for parameter in self.choose(encoder):
            parameter.requires_grad_(True)
        return encoder


@dataclass(frozen=True)
class DecoderOnly(Selective):
    """The baseline of the paper's tables: the encoder stays as it is, the mask decoder alone is trained."""

    def choose(self, encoder: nn.Module) -> Iterable[nn.Parameter]:
        return ()


@dataclass(frozen=True)
class BitFit(Selective):
    """The biases learn: those of linear layers, convolutions and norms, where they have any.

    Ben Zaken et al., "BitFit", ACL 2022, arXiv:2106.10199. TinyViT's tables of attention biases are none of
    these, but relative positions.
    """

    def choose(self, encoder: nn.Module) -> Iterable[nn.Parameter]:
        biases = (module.bias for module in encoder.modules() if isinstance(module, LAYERS))
        return (bias for bias in biases if isinstance(bias, nn.Parameter))


@dataclass(frozen=True)
class NormTuning(Selective):
    """The scales and offsets of the layer norms learn; TinyViT's batch norms are part of its convolutions."""

    def choose(self, encoder: nn.Module) -> Iterable[nn.Parameter]:
        return (p for module in encoder.modules() if isinstance(module, NORMS) for p in module.parameters())


@dataclass(frozen=True)
class Full(Selective):
    """The whole image encoder learns, its tables of positions too, which decay like its matrices.

    It stays in evaluation mode.
    """

    def choose(self, encoder: nn.Module) -> Iterable[nn.Parameter]:
        return encoder.parameters()
