from pathlib import Path

import torch
from timm.models.tiny_vit import Attention, ConvNorm

from convlora.sam.tiny_vit import TinyViTEncoder, WindowAttention, fold_norms
from convlora.sam.zoo import MobileSam, load_backbone


def test_window_attention_equals_timm() -> None:
    torch.manual_seed(0)
    reference = Attention(dim=12, key_dim=4, num_heads=3, attn_ratio=1, resolution=(4, 4))
    torch.nn.init.normal_(reference.attention_biases)
    x = torch.randn(5, 16, 12)
    torch.testing.assert_close(WindowAttention(reference)(x), reference(x))


def test_training_works_after_inference() -> None:
    attention = WindowAttention(Attention(dim=12, key_dim=4, num_heads=3, attn_ratio=1, resolution=(4, 4)))
    attention.requires_grad_(False).eval()
    with torch.inference_mode():
        attention(torch.randn(1, 16, 12))
    x = torch.randn(1, 16, 12, requires_grad=True)
    attention(x).sum().backward()
    assert x.grad is not None


def test_norms_are_folded_into_their_convolutions() -> None:
    torch.manual_seed(0)
    pair = ConvNorm(3, 6, ks=3, pad=1).eval()
    for tensor in (pair.bn.weight, pair.bn.bias, pair.bn.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(pair.bn.running_var, 0.1, 3)
    folded = torch.nn.Conv2d(3, 6, 3, padding=1)
    state = fold_norms({f"x.{key}": value for key, value in pair.state_dict().items()})
    folded.load_state_dict({key.removeprefix("x."): value for key, value in state.items()})
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(image), pair(image))


def test_last_stage_keeps_stride_16() -> None:
    with torch.device("meta"):
        assert TinyViTEncoder()(torch.empty(2, 3, 160, 160)).shape == (2, 256, 10, 10)


def test_real_weights_segment_a_polyp_from_a_box(shared: Path) -> None:
    """The encoder's features fit the checkpoint's own decoder: a box prompt finds the object."""
    import numpy as np
    from PIL import Image

    from convlora.data.samples import to_tensor
    from convlora.data.transforms import SquareResize, eval_transform

    sam, _ = load_backbone(
        MobileSam(name="mobile_sam", image_size=512, weights=str(shared / "weights/mobile_sam.pt"))
    )
    images = sorted((shared / "data/polyp/TestDataset/Kvasir/images").iterdir())[:6]
    scores = []
    for path in images:
        mask = np.array(Image.open(path.parents[1] / "masks" / f"{path.stem}.png")) > 127
        image = np.array(Image.open(path).convert("RGB"))
        pixels = to_tensor(eval_transform(SquareResize(512))(image=image)["image"])
        rows, columns = np.nonzero(mask)
        box = torch.tensor([[columns.min(), rows.min(), columns.max(), rows.max()]]) * 512 / mask.shape[0]
        with torch.inference_mode():
            sparse, dense = sam.prompt_encoder(points=None, boxes=box, masks=None)
            logits, _ = sam.mask_decoder(
                sam.image_encoder(pixels[None]), sam.prompt_encoder.get_dense_pe(), sparse, dense, False
            )
        found = torch.nn.functional.interpolate(logits, mask.shape, mode="bilinear")[0, 0].numpy() > 0
        scores.append((found & mask).sum() / (found | mask).sum())
    assert np.mean(scores) > 0.7
