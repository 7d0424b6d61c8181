"""What every method in conf/peft promises, with every gate that it can have, on every kind of encoder."""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
import torch
from composed import compose, names
from conftest import ROOT, TINY, from_conf
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from ranks import learn_from_halves, task_gradients, together
from torch import Tensor, nn

from convlora.peft.method import LAYERS, Adapted, Method, aux_loss, merge
from convlora.sam.zoo import Sam
from convlora.segmenter import Segmenter

README = ROOT / "README.md"
BACKBONES = {"vit": TINY, "tiny_vit": replace(from_conf("mobile_sam"), image_size=64)}
Choice = tuple[str, ...]
Pair = tuple[Choice, str]


def choices() -> Iterator[Choice]:
    """The command lines that choose a method, of each mixture of experts also with every other gate."""
    seen: list[DictConfig] = []
    for name in names("peft"):
        yield (f"peft/{name}",)
        config = compose(f"peft/{name}").peft
        mixture = OmegaConf.masked_copy(config, [key for key in config if key != "gate"])
        if "gate" in config and config.num_experts > 1 and mixture not in seen:
            seen.append(mixture)
            lines = ((f"peft/{name}", f"peft/gate={gate}") for gate in names("peft/gate"))
            yield from (line for line in lines if compose(*line).peft.gate != config.gate)


@cache
def make(choice: Choice) -> Method:
    made: Method = instantiate(compose(*choice).peft, _convert_="all")
    return made


@cache
def plan(kind: str) -> nn.Module:
    """A frozen image encoder that costs nothing."""
    with torch.device("meta"):
        return BACKBONES[kind].build().image_encoder.requires_grad_(False)


def inject(pair: Pair) -> nn.Module:
    """Adapt a plan; raises what the method does."""
    choice, kind = pair
    with torch.device("meta"):
        return make(choice).inject(copy.deepcopy(plan(kind)))


def refused(pair: Pair) -> bool:
    try:
        inject(pair)
    except ValueError:
        return True
    return False


def mechanisms() -> list[Pair]:
    """Of methods that put the same parts into the encoder, the one that learns most."""
    found: dict[frozenset[type[nn.Module]], tuple[int, Pair]] = {}
    for pair in ON_VIT:
        adapted = inject(pair)
        parts = frozenset(type(module) for module in adapted.modules() if isinstance(module, Adapted))
        size = sum(p.numel() for p in trained(adapted).values())
        if size > found.get(parts, (0,))[0]:
            found[parts] = (size, pair)
    return [pair for _, pair in found.values()]


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def over(pairs: Sequence[Pair]) -> pytest.MarkDecorator:
    identities = [" ".join([*choice, kind]) for choice, kind in pairs]
    return pytest.mark.parametrize(("method", "sam"), pairs, ids=identities, indirect=True)


ON_VIT = [(choice, "vit") for choice in choices()]
ELSEWHERE = [
    (choice, kind) for choice, _ in ON_VIT for kind in BACKBONES if kind != "vit" and len(choice) == 1
]
REFUSED = [pair for pair in ELSEWHERE if refused(pair)]
EVERYWHERE = [*ON_VIT, *(pair for pair in ELSEWHERE if pair not in REFUSED)]
"""Gates do not depend on the encoder."""
everywhere = over(EVERYWHERE)
on_vit = over(ON_VIT)
"""For what does not depend on the encoder."""
of_each_mechanism = over(mechanisms())


@pytest.fixture
def method(request: pytest.FixtureRequest) -> Method:
    return make(request.param)


@pytest.fixture
def sam(request: pytest.FixtureRequest) -> Sam:
    """A frozen SAM that the method can adapt."""
    return copy.deepcopy(build(request.param))


@cache
def build(kind: str) -> Sam:
    """Nothing in it is zero: what starts so, in adapters too, hides what lies around it."""
    torch.manual_seed(0)
    sam = BACKBONES[kind].build()
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


@everywhere
def test_adapted_equals_frozen_at_start(method: Method, sam: Sam) -> None:
    adapted = method.inject(copy.deepcopy(sam.image_encoder)).train()
    equal = torch.equal(adapted(images(sam)), sam.image_encoder(images(sam)))
    assert equal == method.starts_frozen


@everywhere
def test_all_that_the_method_creates_is_trainable(method: Method, frozen: nn.Module) -> None:
    before = {id(p) for p in frozen.parameters()}
    for name, parameter in method.inject(frozen).named_parameters():
        assert parameter.requires_grad or id(parameter) in before, name


@everywhere
def test_every_replaced_part_is_kept_as_base_and_frozen(method: Method, frozen: nn.Module) -> None:
    before, parameters = dict(frozen.named_modules()), {id(p) for p in frozen.parameters()}
    adapted = method.inject(frozen)
    for name, module in adapted.named_modules():
        if module is not before.get(name, module):
            assert module.base is before[name], name
            assert not any(p.requires_grad for p in module.base.parameters(recurse=False)), name
    assert parameters <= {id(p) for p in adapted.parameters()}


@everywhere
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


def fits_into_weights(layer: Adapted) -> bool:
    """Whether it stands for a plain layer and, if that is linear, maps each token alone and straight."""
    if not isinstance(layer.base, nn.Linear):
        return isinstance(layer.base, LAYERS)
    x, y = torch.randn(2, 1, 4, 4, layer.base.in_features)
    between, alone = (layer(x) + layer(y)) / 2, layer(x.view(16, 1, 1, -1)).view(1, 4, 4, -1)
    return torch.allclose(layer((x + y) / 2), between, atol=1e-4) and torch.allclose(
        layer(x), alone, atol=1e-4
    )


@everywhere
def test_encoder_merges_into_a_plain_one_if_all_its_layers_fit_into_weights(method: Method, sam: Sam) -> None:
    frozen = sam.image_encoder
    adapted = adapt(method, frozen).eval()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    if all(fits_into_weights(module) for module in adapted.modules() if isinstance(module, Adapted)):
        merged = merge(adapted).requires_grad_(False)
        assert not any(isinstance(module, Adapted) for module in merged.modules())
        assert merged.state_dict().keys() == frozen.state_dict().keys()
        expected = adapted(images(sam))
        limit = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(merged(images(sam)), expected, rtol=0, atol=limit)
    else:
        with pytest.raises(ValueError, match=r"does not fit .*; use the adapter beside the base weights"):
            merge(adapted)
    after = adapted.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_encoders_are_refused_as_the_readme_says() -> None:
    [said] = re.findall(r"^(.+) are for SAM's ViT and refuse `mobile_sam`", README.read_text(), re.M)
    patterns = re.findall(r"`(.+?)`", said)
    named = {name for name in names("peft") if any(fnmatch(name, pattern) for pattern in patterns)}
    assert {choice for choice, _ in REFUSED} == {(f"peft/{name}",) for name in named}


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: " ".join([*pair[0], pair[1]]))
def test_a_refused_encoder_stays_as_it_was_and_the_way_out_is_told(pair: Pair) -> None:
    choice, kind = pair
    encoder = copy.deepcopy(plan(kind))
    modules, learning = dict(encoder.named_modules()), trained(encoder)
    with pytest.raises(ValueError, match=f"{type(encoder).__name__}.*; choose peft=adapter or "):
        make(choice).inject(encoder)
    assert dict(encoder.named_modules()) == modules
    assert trained(encoder) == learning == {}
    assert not refused((("peft/adapter",), kind))


@over([(choice, kind) for choice, kind in EVERYWHERE if make(choice).width is not None])
def test_width_widens_what_is_trained(method: Method, frozen: nn.Module) -> None:
    assert method.width is not None
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


@everywhere
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


@of_each_mechanism
def test_encoder_compiles_as_one_graph_of_the_same_function(segmenter: Segmenter, sam: Sam) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(1)  # of gates and dropout
        output = backward(segmenter, images(sam))
        results.append({"output": output, **{name: p.grad for name, p in trained(segmenter).items()}})
        segmenter.zero_grad()
        segmenter.compile_encoder(backend="eager")
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_two_ranks_learn_from_half_a_batch_each_what_one_learns_from_all(tmp_path: Path) -> None:
    """By plain DDP, which fails where a tensor is left without a gradient; one method of each mechanism."""
    pairs = mechanisms()
    models = []
    for choice, kind in pairs:
        torch.manual_seed(0)
        models.append(Segmenter(copy.deepcopy(build(kind)), make(choice)).train())
        move(models[-1])
    batch = images(build("vit"))
    torch.save((models, batch), tmp_path / "models.pt")
    together(learn_from_halves, tmp_path)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (choice, _), model, *found in zip(pairs, models, *both, strict=True):
        expected = task_gradients(model, batch)
        assert expected.keys() == trained(model).keys()
        for name, gradient in expected.items():
            limit = 1e-4 * max(gradient.abs().max().item(), 1e-6)
            for each in found:
                torch.testing.assert_close(each[name], gradient, rtol=0, atol=limit, msg=f"{choice} {name}")
