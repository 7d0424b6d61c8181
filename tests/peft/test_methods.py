"""What every method in conf/peft promises, with every gate that it can have, on every kind of encoder."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from composed import compose, names
from conftest import TINY, from_conf
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from convlora.peft.method import Adapted, Method, aux_loss, merge
from convlora.sam.zoo import Backbone, Sam
from convlora.segmenter import Segmenter

BACKBONES = {"vit": TINY, "tiny_vit": replace(from_conf("mobile_sam"), image_size=64)}
on_vit = pytest.mark.parametrize("sam", ["vit"], indirect=True)
"""For what does not depend on the encoder, or takes long on a CPU."""


def choices() -> Iterator[list[str]]:
    """The command lines that choose a method, of each mixture of experts also with every other gate."""
    seen: list[DictConfig] = []
    for name in names("peft"):
        yield [f"peft/{name}"]
        config = compose(f"peft/{name}").peft
        mixture = OmegaConf.masked_copy(config, [key for key in config if key != "gate"])
        if "gate" in config and config.num_experts > 1 and mixture not in seen:
            seen.append(mixture)
            lines = ([f"peft/{name}", f"peft/gate={gate}"] for gate in names("peft/gate"))
            yield from (line for line in lines if compose(*line).peft.gate != config.gate)


@pytest.fixture(params=choices(), ids=" ".join)
def method(request: pytest.FixtureRequest) -> Method:
    return make(*request.param)


@cache
def make(*choice: str) -> Method:
    made: Method = instantiate(compose(*choice).peft, _convert_="all")
    return made


@pytest.fixture(params=BACKBONES)
def sam(request: pytest.FixtureRequest, method: Method) -> Sam:
    """A frozen SAM that the method can adapt."""
    made = build(BACKBONES[request.param])
    if request.param != "vit":
        if "peft/gate" in request.node.name:
            pytest.skip("a gate does not depend on the encoder")
        try:
            with torch.device("meta"):  # where it costs nothing
                method.inject(copy.deepcopy(made.image_encoder).to("meta"))
        except ValueError as refused:
            pytest.skip(str(refused))
    return copy.deepcopy(made)


@cache
def build(backbone: Backbone) -> Sam:
    """Nothing in it is zero: what starts so, in adapters too, hides what lies around it."""
    torch.manual_seed(0)
    sam = backbone.build()
    move(sam)
    sam.load_state_dict(sam.state_dict())  # tables follow
    return sam.requires_grad_(False)


@pytest.fixture
def frozen(sam: Sam) -> nn.Module:
    return sam.image_encoder


@pytest.fixture
def segmenter(sam: Sam, method: Method) -> Segmenter:
    """One that has learnt something."""
    torch.manual_seed(0)
    made = Segmenter(sam, method)
    move(made)
    return made.train()


def adapt(method: Method, frozen: nn.Module) -> nn.Module:
    """Adapt a copy, and let it learn something."""
    adapted = method.inject(copy.deepcopy(frozen))
    move(adapted)
    return adapted


def move(module: nn.Module) -> None:
    """Move what is trainable away from where it starts."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn_like(parameter)
                parameter.add_(parameter * noise if parameter.any() else noise)


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def backward(segmenter: nn.Module, images: Tensor) -> Tensor:
    """Give every tensor the gradient of the task and of the layers' own losses; return the output."""
    output: Tensor = segmenter(images)
    loss, aux = output.square().mean(), aux_loss(segmenter)
    (loss if aux is None else loss + aux).backward()
    return output


def images(sam: Sam, dtype: torch.dtype = torch.float32) -> Tensor:
    side = sam.prompt_encoder.input_image_size[0]
    return torch.randn(
        2 * 64 // side * 64 // side, 3, side, side, generator=torch.Generator().manual_seed(1)
    ).to(dtype)


def test_adapted_equals_frozen_at_start(method: Method, sam: Sam) -> None:
    adapted = method.inject(copy.deepcopy(sam.image_encoder)).train()
    equal = torch.equal(adapted(images(sam)), sam.image_encoder(images(sam)))
    assert equal == method.starts_frozen


def test_all_that_the_method_creates_is_trainable(method: Method, frozen: nn.Module) -> None:
    before = {id(p) for p in frozen.parameters()}
    for name, parameter in method.inject(frozen).named_parameters():
        assert parameter.requires_grad or id(parameter) in before, name


def test_every_replaced_part_is_kept_as_base_and_frozen(method: Method, frozen: nn.Module) -> None:
    before, parameters = dict(frozen.named_modules()), {id(p) for p in frozen.parameters()}
    adapted = method.inject(frozen)
    for name, module in adapted.named_modules():
        if module is not before.get(name, module):
            assert module.base is before[name], name
            assert not any(p.requires_grad for p in module.base.parameters(recurse=False)), name
    assert parameters <= {id(p) for p in adapted.parameters()}


def test_a_step_changes_every_trainable_tensor_and_no_other(segmenter: Segmenter, sam: Sam) -> None:
    learning = trained(segmenter)
    tensors = dict([*segmenter.named_parameters(), *segmenter.named_buffers()])
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    backward(segmenter, images(sam))
    # steps of one length, however small a gradient is
    torch.optim.AdamW(learning.values(), weight_decay=0.0, eps=1e-30).step()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]) == (name not in learning), name


@on_vit
def test_state_of_the_trained_tensors_is_all_state(method: Method, sam: Sam) -> None:
    frozen = sam.image_encoder
    adapted, fresh = adapt(method, frozen).eval(), adapt(method, frozen).eval()
    state = trained(adapted)
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(fresh(images(sam)), adapted(images(sam)))
    assert not state or not torch.equal(adapted(images(sam)), frozen(images(sam)))


def test_merged_encoder_is_a_plain_one_of_the_same_function_or_refused(method: Method, sam: Sam) -> None:
    frozen = sam.image_encoder
    adapted = adapt(method, frozen).eval()
    try:
        merged = merge(adapted).requires_grad_(False)
    except ValueError as refused:
        pytest.skip(str(refused))
    assert not any(isinstance(module, Adapted) for module in merged.modules())
    assert merged.state_dict().keys() == frozen.state_dict().keys()
    torch.testing.assert_close(merged(images(sam)), adapted(images(sam)), rtol=0, atol=1e-5)


def test_width_widens_what_is_trained(method: Method, frozen: nn.Module) -> None:
    if method.width is None:
        pytest.skip("has no width")
    wider = replace(method, **{method.width: 2 * getattr(method, method.width)})
    counts = [
        sum(p.numel() for p in trained(each.inject(copy.deepcopy(frozen))).values())
        for each in (method, wider)
    ]
    assert counts[0] < counts[1]


@on_vit
def test_layers_and_encoders_share_nothing(method: Method, frozen: nn.Module) -> None:
    """What a method creates for one layer serves no other."""
    created: list[nn.Module] = []
    for encoder in (frozen, copy.deepcopy(frozen)):
        before = {id(module) for module in encoder.modules()}
        adapted = method.inject(encoder)
        found = (module for _, module in adapted.named_modules(remove_duplicate=False))
        created += [module for module in found if id(module) not in before]
    parameters = [p for module in created for p in module.parameters(recurse=False)]
    for things in (created, parameters):
        assert len({id(thing) for thing in things}) == len(things)


@on_vit
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_trains_in_half_precision(segmenter: Segmenter, sam: Sam, parameters: torch.dtype) -> None:
    """By autocast, and with parameters held in bfloat16 as Lightning's `bf16-true` does."""
    segmenter.to(parameters)
    with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
        output = backward(segmenter, images(sam, parameters))
    assert output.isfinite().all()
    for name, parameter in trained(segmenter).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameters, name
        assert parameter.grad.isfinite().all(), name


@on_vit
def test_copies_after_a_backward_pass_are_equal_and_apart(segmenter: Segmenter, sam: Sam) -> None:
    backward(segmenter, images(sam))
    twin = copy.deepcopy(segmenter).eval()
    expected = segmenter.eval()(images(sam))
    assert torch.equal(twin(images(sam)), expected)
    with torch.no_grad():
        for parameter in trained(twin).values():
            parameter.add_(1)
    assert torch.equal(segmenter(images(sam)), expected)


@on_vit
def test_evaluation_repeats_itself(method: Method, sam: Sam) -> None:
    adapted = adapt(method, sam.image_encoder).eval()
    assert torch.equal(adapted(images(sam)), adapted(images(sam)))
