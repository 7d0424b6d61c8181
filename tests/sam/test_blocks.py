import pytest
import torch
from torch import nn

from convlora.sam.blocks import attention_half, mlp_half, walk


def test_a_kind_that_is_not_known_is_named_with_the_place_to_add_it() -> None:
    for ask in (attention_half, mlp_half, lambda *given: next(walk(*given))):
        with pytest.raises(
            TypeError, match=r"Linear is not known to convlora\.sam\.blocks; add its case there"
        ):
            ask(nn.Linear(1, 1), torch.zeros(1))
