"""What every method in conf/peft promises, with every gate that it can have."""

import copy
from collections.abc import Iterator

import pytest
import torch
from composed import compose, names
from hydra.utils import instantiate
from torch import Tensor, nn

from convlora.peft.method import Method, aux_loss
from convlora.sam.zoo import SamViT
from convlora.segmenter import Segmenter


def choices() -> Iterator[list[str]]:
    """The command lines that choose a method; a gate has nothing to learn where there is one expert."""
    for name in names("peft"):
        gates = names("peft/gate") if compose(f"peft/{name}").peft.get("num_experts", 1) > 1 else []
        yield from ([f"peft/{name}", f"peft/gate={gate}"] for gate in gates) if gates else [[f"peft/{name}"]]


@pytest.fixture(params=choices(), ids=" ".join)
def method(request: pytest.FixtureRequest) -> Method:
    made: Method = instantiate(compose(*request.param).peft, _convert_="all")
    return made


@pytest.fixture
def frozen(tiny: SamViT) -> nn.Module:
    torch.manual_seed(0)
    return tiny.build().image_encoder.requires_grad_(False).eval()


def adapt(method: Method, frozen: nn.Module) -> nn.Module:
    """Adapt a copy, and move it away from the start, where what is zero hides what lies around it."""
    return randomise(method.inject(copy.deepcopy(frozen)))


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    return module


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def take_step(segmenter: nn.Module, images: Tensor) -> Tensor:
    """Give every tensor the gradient of the task and of the layers' own losses; return the output."""
    output: Tensor = segmenter(images)
    loss, aux = output.square().mean(), aux_loss(segmenter)
    (loss if aux is None else loss + aux).backward()
    return output


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_adapted_equals_frozen_at_start(method: Method, frozen: nn.Module) -> None:
    adapted = method.inject(copy.deepcopy(frozen)).train()
    assert torch.equal(adapted(images()), frozen(images())) == method.starts_frozen


def test_only_what_the_method_creates_is_trainable(method: Method, frozen: nn.Module) -> None:
    before = {id(p) for p in frozen.parameters()}
    for name, parameter in method.inject(frozen).named_parameters():
        assert parameter.requires_grad == (id(parameter) not in before), name


def test_every_replaced_layer_is_kept_as_base(method: Method, frozen: nn.Module) -> None:
    before, parameters = dict(frozen.named_modules()), {id(p) for p in frozen.parameters()}
    adapted = method.inject(frozen)
    for name, module in adapted.named_modules():
        if module is not before.get(name, module):
            assert module.base is before[name], name
    assert parameters <= {id(p) for p in adapted.parameters()}


def test_every_trainable_tensor_learns_from_a_step(method: Method, tiny: SamViT) -> None:
    torch.manual_seed(0)
    segmenter = randomise(Segmenter(tiny.build(), method)).train()
    take_step(segmenter, images())
    for name, parameter in trained(segmenter).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_state_of_the_trained_tensors_is_all_state(method: Method, frozen: nn.Module) -> None:
    adapted, fresh = adapt(method, frozen).eval(), adapt(method, frozen).eval()
    state = trained(adapted)
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(fresh(images()), adapted(images()))
    assert not state or not torch.equal(adapted(images()), frozen(images()))


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


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_trains_in_half_precision(method: Method, tiny: SamViT, parameters: torch.dtype) -> None:
    """By autocast, and with parameters held in bfloat16 as Lightning's `bf16-true` does."""
    torch.manual_seed(0)
    segmenter = randomise(Segmenter(tiny.build(), method)).to(parameters).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
        output = take_step(segmenter, images(parameters))
    assert output.isfinite().all()
    for name, parameter in trained(segmenter).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameters, name
        assert parameter.grad.isfinite().all(), name


def test_copies_after_a_step_are_equal_and_apart(method: Method, tiny: SamViT) -> None:
    torch.manual_seed(0)
    segmenter = randomise(Segmenter(tiny.build(), method)).train()
    take_step(segmenter, images())
    twin = copy.deepcopy(segmenter).eval()
    expected = segmenter.eval()(images())
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        for parameter in trained(twin).values():
            parameter.add_(1)
    assert torch.equal(segmenter(images()), expected)


def test_evaluation_repeats_itself(method: Method, frozen: nn.Module) -> None:
    adapted = adapt(method, frozen).eval()
    assert torch.equal(adapted(images()), adapted(images()))
