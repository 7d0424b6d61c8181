"""What only a GPU can show."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Commands
from segment_anything.modeling.image_encoder import Attention
from torch import nn

from convlora import train
from convlora.losses import StructureLoss
from convlora.peft.conv_experts import ConvExperts
from convlora.peft.conv_lora import ConvLoRA
from convlora.peft.gating import NoisyTopK
from convlora.peft.method import aux_loss
from convlora.sam.attention import RelPosAttention
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_never_waits_for_the_gpu(tiny: SamViT, checkpointing: bool) -> None:
    sam = replace(tiny, activation_checkpointing=checkpointing).build()
    segmenter = Segmenter(sam, ConvLoRA(gate=NoisyTopK(top_k=2))).train().cuda()
    optimizer = torch.optim.AdamW(p for p in segmenter.parameters() if p.requires_grad)
    images = torch.randn(2, 3, 32, 32, device="cuda")
    masks = torch.rand(2, 1, 32, 32, device="cuda").round()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = StructureLoss()(segmenter(images), masks)
        aux = aux_loss(segmenter)
        assert aux is not None
        (loss + aux).backward()
        nn.utils.clip_grad_norm_(segmenter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_experts_equal_the_cpus() -> None:
    torch.manual_seed(0)
    experts = ConvExperts(3, range(1, 9))
    z, choice, gates = torch.randn(6, 14, 14, 3), torch.randint(8, (6, 2)), torch.rand(6, 2)
    expected = experts(z, choice, gates)
    found = copy.deepcopy(experts).cuda()(z.cuda(), choice.cuda(), gates.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_segment_anything(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = Attention(80, num_heads=2, use_rel_pos=True, input_size=(14, 14)).requires_grad_(False)
    nn.init.normal_(theirs.rel_pos_h, std=0.1)
    nn.init.normal_(theirs.rel_pos_w, std=0.1)
    x = torch.randn(3, 14, 14, 80)
    expected = theirs(x)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = RelPosAttention(theirs).cuda()(x.cuda()).float().cpu()
    limit = 1e-4 if dtype == torch.float32 else 0.03
    assert (found - expected).abs().max() < limit * expected.abs().max()


def test_float16_trains_by_its_gradient_scaler_from_the_command_line(cli: Commands) -> None:
    done = cli(
        train, *SMALL, "logger=csv", "run_dir=run", "trainer.accelerator=gpu", "trainer.precision=16-mixed"
    )
    assert done.code == 0, done.err
    last = torch.load("run/last.ckpt", weights_only=True)
    assert last["MixedPrecision"]["scale"] > 0
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert all(value.dtype == torch.float32 for value in last["state_dict"].values())
    assert len(last["optimizer_states"][0]["state"]) == len(last["state_dict"])
    assert json.loads(Path("run/summary.json").read_text())["precision"] == "16-mixed"
