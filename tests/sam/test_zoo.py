import http.server
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, from_conf
from safetensors.torch import save_file
from torch import Tensor

from convlora.peft.conv_lora import ConvLoRA
from convlora.peft.method import aux_loss
from convlora.sam.attention import offset_table, resample_offsets
from convlora.sam.checkpoints import hash_file
from convlora.sam.zoo import Backbone, MobileSam, SamViT, load_backbone, resample_grid
from convlora.segmenter import Segmenter

SMALL_VIT = SamViT(
    name="small", embed_dim=16, depth=2, num_heads=2, global_attn_indexes=(1,), image_size=32, patch_size=4,
    window_size=4, decoder_dim=32,
)  # fmt: skip
MODELS = sorted((ROOT / "conf" / "model").glob("*.yaml"))


@pytest.fixture
def weights(tiny: SamViT, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "tiny.pth"
    torch.save(tiny.build().state_dict(), path)
    return path


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_backbone_maps_images_to_its_grid(path: Path) -> None:
    backbone = from_conf(path.stem)
    with torch.device("meta"):
        sam = backbone.build()
        embeddings = sam.image_encoder(torch.empty(1, 3, backbone.image_size, backbone.image_size))
    assert embeddings.shape[2:] == sam.prompt_encoder.image_embedding_size
    assert backbone.name == path.stem


@pytest.mark.parametrize("kind", ["b", "l", "h"])
def test_architecture_equals_segment_anything(kind: str) -> None:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        expected = sam_model_registry[f"vit_{kind}"]().state_dict()
        found = from_conf(f"sam_vit_{kind}").build().state_dict()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in expected.items() if not key.startswith("pixel_")
    }


def test_checkpoint_is_loaded_tensor_by_tensor(tiny: SamViT, weights: Path) -> None:
    sam, _ = load_backbone(replace(tiny, weights=str(weights)))
    expected = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, expected[key]) for key, value in sam.state_dict().items())


@pytest.mark.parametrize("file", ["tiny.safetensors", "tiny.ckpt"])
def test_weights_may_be_safetensors_or_lie_under_state_dict(
    tiny: SamViT, weights: Path, tmp_path: Path, file: str
) -> None:
    expected = torch.load(weights, weights_only=True)
    path = tmp_path / file
    if file.endswith("ckpt"):
        torch.save({"state_dict": expected, "epoch": 3}, path)
    else:
        save_file(expected, path)
    sam, sha256 = load_backbone(replace(tiny, weights=str(path)))
    assert all(torch.equal(value, expected[key]) for key, value in sam.state_dict().items())
    assert sha256 == hash_file(path)


def test_random_weights_are_the_same_in_every_process(tiny: SamViT) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, hash_1 = load_backbone(tiny)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, hash_2 = load_backbone(tiny)
    assert hash_1 == hash_2
    assert torch.equal(
        first.image_encoder.patch_embed.proj.weight, second.image_encoder.patch_embed.proj.weight
    )


def test_hash_tells_weights_apart(tiny: SamViT, weights: Path) -> None:
    assert load_backbone(tiny)[1] != load_backbone(replace(tiny, weights=str(weights)))[1]


def test_other_image_size_keeps_the_positions(tiny: SamViT, weights: Path) -> None:
    """A table that rises along an axis still does, from and to the same values, at another size."""
    state = torch.load(weights, weights_only=True)
    ramp = torch.linspace(0, 1, 8)
    state["image_encoder.pos_embed"] = ramp.view(1, 1, 8, 1).expand(1, 8, 8, 16).contiguous()
    torch.save(state, weights)
    sam, _ = load_backbone(replace(tiny, weights=str(weights), image_size=64))
    table = sam.image_encoder.pos_embed[0, 5, :, 3]
    expected = (torch.arange(16) + 0.5) / 16 * 8 - 0.5
    torch.testing.assert_close(table[4:-4], expected[4:-4] / 7, atol=0.01, rtol=0)  # bicubic ripples
    assert sam.image_encoder(torch.randn(1, 3, 64, 64)).shape == (1, 32, 16, 16)


def test_same_size_tables_are_untouched() -> None:
    grid, offsets = torch.randn(1, 4, 4, 3), torch.randn(7, 3)
    assert resample_grid(grid, 4) is grid
    assert resample_offsets(offsets, 7) is offsets


def test_offsets_are_resampled_as_segment_anything_does() -> None:
    from segment_anything.modeling.image_encoder import get_rel_pos

    table = torch.randn(15, 6)
    torch.testing.assert_close(offset_table(table, 5), get_rel_pos(5, 5, table))


@pytest.mark.parametrize(
    "backbone", [SMALL_VIT, MobileSam(name="mobile_sam", image_size=64)], ids=["vit", "tiny_vit"]
)
def test_activation_checkpointing_changes_memory_only(backbone: Backbone) -> None:
    results, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        sam = replace(backbone, activation_checkpointing=checkpointing).build()
        encoder = Segmenter(sam, ConvLoRA(num_experts=4)).image_encoder.train()
        for name, parameter in encoder.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(parameter)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            embeddings = encoder(torch.randn(2, 3, backbone.image_size, backbone.image_size))
            aux = aux_loss(encoder)
        assert aux is not None
        (embeddings.square().sum() + aux).backward()
        trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        results.append({name: p.grad for name, p in trained.items()} | {"aux": aux.detach()})
        kept.append(sum(sizes))
        gate = [g for name, g in results[-1].items() if name.endswith("gate.noise_weight")]
        assert all(g is not None and g.abs().max() > 0 for g in gate)
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=lambda m, name=name: f"{name}: {m}")
    assert kept[1] < kept[0] / 2


def test_frozen_weights_in_half_precision_give_the_same_under_autocast(tiny: SamViT) -> None:
    full, _ = load_backbone(tiny)
    half, _ = load_backbone(replace(tiny, frozen_dtype="bfloat16"))
    images = torch.randn(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.image_encoder(images), full.image_encoder(images))
    size = [sum(p.nbytes for p in sam.image_encoder.parameters()) for sam in (full, half)]
    assert size[1] < 0.7 * size[0]
    assert {p.dtype for p in half.mask_decoder.parameters()} == {torch.float32}


def padding(backbone: Backbone) -> float:
    """How many times its own tokens the attention of a block sees, at most."""
    with torch.device("meta"):
        encoder = backbone.build().image_encoder
        shares = []
        for block in encoder.blocks:
            if hasattr(block, "attn"):
                block.register_forward_pre_hook(lambda _, args: shares.append(-args[0].numel()))
                block.attn.register_forward_pre_hook(lambda _, args: shares.append(args[0].numel()))
        encoder(torch.empty(1, 3, backbone.image_size, backbone.image_size))
    return max(attention / -block for block, attention in zip(shares[::2], shares[1::2], strict=True))


@pytest.mark.parametrize("name", ["sam_tiny", "sam_vit_b", "mobile_sam"])
def test_padding_advice_says_what_the_encoder_does(name: str) -> None:
    for size in (208, 512, 896):
        backbone = replace(from_conf(name), image_size=size)
        advice = backbone.padding_advice()
        if advice is None:
            assert padding(backbone) == 1
            continue
        assert f"{padding(backbone) - 1:.0%} more work" in advice
        fitting = [int(word) for word in advice.partition("; ")[2].removesuffix(" fit").split(", ")]
        assert min(abs(fit - size) for fit in fitting) <= fitting[-1] - fitting[-2]
        for fit in fitting:
            fitted = replace(backbone, image_size=fit)
            assert padding(fitted) == 1
            assert fitted.padding_advice() is None


def test_padding_advice_reads_well() -> None:
    assert replace(from_conf("sam_vit_b"), image_size=512).padding_advice() == (
        "512 px: 32 x 32 tokens are padded to 42 x 42 in windows of 14, 72% more work there; "
        "448, 672, 896 fit"
    )
    assert from_conf("sam_tiny").padding_advice() is None


def test_no_windows_need_no_padding() -> None:
    for everywhere_global in ({"window_size": 0}, {"global_attn_indexes": range(12)}):
        assert replace(from_conf("sam_vit_b"), image_size=512, **everywhere_global).padding_advice() is None


def test_source_of_the_weights_is_told(tiny: SamViT, weights: Path, cache: Path) -> None:
    assert tiny.weights_source() == "random weights"
    assert tiny.is_random
    own = replace(tiny, weights=str(weights), url="http://localhost/tiny.pth")
    assert own.weights_source() == f"weights {weights}"
    assert replace(own, weights="gone.pth").weights_source() == "weights gone.pth (no such file)"
    online = replace(own, weights=None)
    assert online.weights_source() == (
        f"weights {cache}/tiny.pth (to be downloaded from http://localhost/tiny.pth)"
    )
    cache.mkdir(parents=True)
    weights.rename(cache / "tiny.pth")
    assert online.weights_source() == f"weights {cache}/tiny.pth"
    assert not own.is_random
    assert not online.is_random


@pytest.mark.parametrize("size", [0, 30, -16])
def test_image_size_off_the_patch_grid_is_refused(tiny: SamViT, size: int) -> None:
    with pytest.raises(ValueError, match=rf"model.image_size={size} .* patch size 4; try"):
        replace(tiny, image_size=size)


def test_missing_weights_file_is_named(tiny: SamViT) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"tiny: no weights file at nowhere.pth; set model.weights=PATH"
    ):
        load_backbone(replace(tiny, weights="nowhere.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_weights_are_refused(tiny: SamViT, weights: Path, zipped: bool) -> None:
    state = torch.load(weights, weights_only=True)
    torch.save(state, weights, _use_new_zipfile_serialization=zipped)
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"tiny.pth is .*truncated"):
        load_backbone(replace(tiny, weights=str(weights)))


def test_code_in_a_weights_file_does_not_run(tiny: SamViT, tmp_path: Path) -> None:
    trace = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(trace), "w")

    for number, save in enumerate((torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)))):
        path = tmp_path / f"attack{number}.pth"
        save({"image_encoder.pos_embed": Attack()}, path)
        with pytest.raises(ValueError, match="pickle that could run code"):
            load_backbone(replace(tiny, weights=str(path)))
        assert not trace.exists()


def test_weights_of_another_model_are_refused(tiny: SamViT, weights: Path) -> None:
    with pytest.raises(
        ValueError, match=r"tiny.pth holds another model; .* of another shape \(first .*Take the checkpoint"
    ):
        load_backbone(replace(tiny, weights=str(weights), embed_dim=24))
    with pytest.raises(ValueError, match=r"holds another model; .* missing \(first image_encoder.blocks.2"):
        load_backbone(replace(tiny, weights=str(weights), depth=3))


def test_file_without_tensors_is_refused(tiny: SamViT, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no dictionary of tensors"):
        load_backbone(replace(tiny, weights=str(tmp_path / "list.pth")))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/hub/checkpoints"


def published(tiny: SamViT, weights: Path) -> str:
    """Name a file as the official ones are named, by the start of its hash."""
    _, sha256 = load_backbone(replace(tiny, weights=str(weights)))
    return weights.rename(weights.with_name(f"tiny_{sha256[:6]}.pth")).name


def test_download_is_verified_and_cached(tiny: SamViT, weights: Path, server: str, cache: Path) -> None:
    name = published(tiny, weights)
    online = replace(tiny, url=f"{server}/{name}")
    _, sha256 = load_backbone(online)
    assert sha256.startswith(name[5:11])
    weights.with_name(name).unlink()
    assert load_backbone(online)[1] == sha256  # from the cache


def test_damaged_download_is_refused(tiny: SamViT, weights: Path, server: str, cache: Path) -> None:
    weights.rename(weights.with_name("tiny_000000.pth"))
    with pytest.raises(ValueError, match=r"should start with 000000; .*set model.weights=PATH"):
        load_backbone(replace(tiny, url=f"{server}/tiny_000000.pth"))
    assert not list(cache.glob("*.pth"))


def test_damaged_cache_is_refused(tiny: SamViT, weights: Path, server: str, cache: Path) -> None:
    online = replace(tiny, url=f"{server}/{published(tiny, weights)}")
    load_backbone(online)
    [path] = cache.glob("*.pth")
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="delete it to download it again"):
        load_backbone(online)


def test_absent_file_on_the_server_is_reported(tiny: SamViT, server: str, cache: Path) -> None:
    with pytest.raises(OSError, match=r"tiny: could not download .*404.*set model.weights=PATH"):
        load_backbone(replace(tiny, url=f"{server}/tiny_aaaaaa.pth"))


def test_mobile_sam_accepts_its_checkpoint(shared: Path) -> None:
    path = shared / "weights/mobile_sam.pt"
    sam, _ = load_backbone(MobileSam(name="mobile_sam", image_size=256, weights=str(path)))
    expected = torch.load(path, weights_only=True)
    own = sam.state_dict()
    assert torch.equal(
        own["image_encoder.stages.3.blocks.1.attn.qkv.weight"],
        expected["image_encoder.layers.3.blocks.1.attn.qkv.weight"],
    )
    downsample = "image_encoder.layers.0.downsample.conv2"
    scale = expected[f"{downsample}.bn.weight"] / (expected[f"{downsample}.bn.running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(
        own["image_encoder.stages.1.downsample.conv2.weight"],
        expected[f"{downsample}.c.weight"] * scale[:, None, None, None],
    )


def test_sam_vit_tiny_accepts_weights_of_its_shape(shared: Path) -> None:
    path = shared / "weights/sam_vit_tiny.pt"
    sam, _ = load_backbone(replace(from_conf("sam_vit_tiny"), weights=str(path)))
    for key, value in torch.load(path, weights_only=True).items():
        assert torch.equal(sam.state_dict()[key], value.float())


def test_mobile_sam_refuses_a_checkpoint_of_sam(tiny: SamViT, weights: Path) -> None:
    with pytest.raises(ValueError, match=r"mobile_sam: .* holds another model"):
        load_backbone(MobileSam(name="mobile_sam", weights=str(weights)))
