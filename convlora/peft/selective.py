"""Methods that add nothing to the encoder and only choose which of its own tensors learn."""

from dataclasses import dataclass

from torch import nn

from convlora.peft.method import Method


@dataclass(frozen=True)
class DecoderOnly(Method):
    """The baseline of the paper's tables: the encoder stays as it is, the mask decoder alone is trained."""

    def inject(self, encoder: nn.Module) -> nn.Module:
        return encoder
