from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import from_conf
from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor, nn

from convlora.peft.lst import FusedAttention, LadderSideTuning
from convlora.sam.tiny_vit import TinyViTEncoder
from convlora.sam.zoo import MobileSam, SamViT
from convlora.segmenter import Segmenter


def randomised(ladder: Any) -> Any:
    nn.init.normal_(ladder.up.weight)
    for rung in ladder.rungs.values():
        nn.init.normal_(rung.gate, std=0.1)
    return ladder


def frozen_tokens(encoder: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What enters and leaves each transformer block, and the embeddings."""
    entering, leaving = [], []

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        entering.append(inputs[0])
        leaving.append(output)

    blocks = [block for block in encoder.blocks if hasattr(block, "attn")]
    hooks = [block.register_forward_hook(note) for block in blocks]
    embeddings = encoder(images)
    for hook in hooks:
        hook.remove()
    return entering, leaving, embeddings


def test_side_attention_equals_segment_anything() -> None:
    torch.manual_seed(0)
    ours, theirs = FusedAttention(6), Attention(6, num_heads=1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("blocks", "read"), [(None, [0, 1]), ([1], [1])])
def test_side_network_is_a_ladder(tiny: SamViT, blocks: list[int] | None, read: list[int]) -> None:
    torch.manual_seed(0)
    encoder, images = tiny.build().image_encoder, torch.randn(2, 3, 32, 32)
    entering, leaving, _ = frozen_tokens(encoder, images)
    ladder = randomised(LadderSideTuning(channels=6, blocks=blocks).inject(encoder))
    state = ladder.down(entering[read[0]])
    for index in read:
        rung = ladder.rungs[str(index)]
        assert isinstance(rung.block, Block)
        assert rung.block.window_size == encoder.blocks[index].window_size
        g = 1 / (1 + (-10 * rung.gate).exp())
        state = rung.block(g * state + (1 - g) * rung.down(leaving[index]))
    expected = encoder.neck((leaving[-1] + ladder.up(state)).permute(0, 3, 1, 2))
    torch.testing.assert_close(ladder(images), expected)


def test_state_follows_the_grids_of_tiny_vit() -> None:
    torch.manual_seed(0)
    encoder, images = TinyViTEncoder().eval(), torch.randn(1, 3, 64, 64)
    entering, leaving, embeddings = frozen_tokens(encoder, images)
    ladder = LadderSideTuning(channels=6, blocks=[0, -1]).inject(encoder)
    assert torch.equal(ladder(images), embeddings)
    randomised(ladder)
    state = ladder.down(entering[0])
    for index in (0, 9):
        rung, h = ladder.rungs[str(index)], leaving[index]
        state = F.interpolate(state.permute(0, 3, 1, 2), h.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
        g = 1 / (1 + (-10 * rung.gate).exp())
        state = rung.block(g * state + (1 - g) * rung.down(h))
    expected = encoder.neck((leaving[-1] + ladder.up(state)).permute(0, 3, 1, 2))
    torch.testing.assert_close(ladder(images), expected)


@pytest.mark.parametrize("kind", ["vit", "tiny_vit"])
def test_autograd_keeps_nothing_of_the_frozen_blocks(tiny: SamViT, kind: str) -> None:
    backbone = tiny if kind == "vit" else MobileSam(name="mobile_sam", image_size=64)
    segmenter = Segmenter(backbone.build(), LadderSideTuning(channels=6)).train()
    inside, kept, outputs = [False], {True: 0, False: 0}, []

    def pack(tensor: Tensor) -> Tensor:
        kept[inside[0]] += 1
        return tensor

    for block in segmenter.image_encoder.blocks:
        block.register_forward_pre_hook(lambda module, inputs: inside.__setitem__(0, True))
        block.register_forward_hook(lambda module, inputs, output: inside.__setitem__(0, False))
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        segmenter(torch.randn(1, 3, backbone.image_size, backbone.image_size)).sum().backward()
    assert kept[False]
    assert not kept[True]
    assert not any(output.requires_grad for output in outputs)


def test_vit_h_trains_about_as_many_parameters_as_the_table_says() -> None:
    with torch.device("meta"):
        segmenter = Segmenter(from_conf("sam_vit_h").build(), LadderSideTuning())
    assert sum(p.numel() for p in segmenter.parameters() if p.requires_grad) == 11_503_746
