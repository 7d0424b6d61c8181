from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from convlora.data.transforms import LongestSideResize, SquareResize
from convlora.inference import Predictor, TiledSegmenter
from convlora.tiles import Grid, Tiling, check_tile, choose_tiling

SIZES = [(70, 130), (30, 90), (51, 52), (100, 33)]


def blended(grid: Grid, image: Tensor, row: int = 0) -> Tensor:
    """What windows cut from an image amount to again, from a row of windows on."""
    first = grid.first_row(row) * len(grid.lefts)
    tiles = [image[:, top : top + h, left : left + w] for top, left, h, w in grid.windows[first:]]
    store = torch.zeros(len(image), grid.size[0], grid.width)
    return torch.cat([rows.clone() for _, rows in grid.blend(tiles, store, row)], dim=1)


@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.5])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_windows_that_agree_blend_to_what_they_agree_on(height: int, width: int, overlap: float) -> None:
    grid, image = Grid(height, width, Tiling(32, overlap)), torch.randn(2, height, width)
    assert torch.allclose(blended(grid, image), image, atol=1e-5)


def test_blending_begun_at_a_later_row_gives_the_same_pixels() -> None:
    grid, image = Grid(130, 70, Tiling(32, 0.4)), torch.randn(1, 130, 70)
    whole = blended(grid, image)
    for row, top in enumerate(grid.tops):
        assert torch.equal(blended(grid, image, row), whole[:, top:])


@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.5])
def test_neighbours_overlap_by_no_less_than_asked_for_and_reach_both_ends(overlap: float) -> None:
    for length in range(33, 200):
        starts = Grid(length, 32, Tiling(32, overlap)).tops
        assert (starts[0], starts[-1]) == (0, length - 32)
        steps = np.diff(starts)
        assert steps.max() <= 32 * (1 - overlap) + 0.5  # rounded to a pixel
        assert steps.min() >= 1


def test_weights_fall_to_nothing_at_the_edges_that_have_a_neighbour() -> None:
    grid = Grid(160, 64, Tiling(64, 0.25))
    numbered = [torch.full((1, 64, 64), float(index)) for index in range(len(grid.tops))]
    store = torch.zeros(1, 64, 64)
    rows = torch.cat([rows.clone() for _, rows in grid.blend(numbered, store)], dim=1)[0, :, 0]
    assert rows.diff().abs().max() < 0.2  # from 0 to the last number without a step
    assert (rows[0], rows[-1]) == (0, len(grid.tops) - 1)


def test_a_window_without_logits_leaves_those_of_its_neighbours() -> None:
    grid = Grid(32, 56, Tiling(32, 0.25))
    store = torch.zeros(1, 32, 56)
    [rows] = [rows.clone() for _, rows in grid.blend([torch.ones(1, 32, 32), None], store)]
    assert (rows[0, :, : grid.lefts[1]] == 1).all()
    assert (rows[0, :, 32:] == 0).all()


class Edges(nn.Module):
    """A segmenter of one 3 x 3 convolution with padding, which is what makes seams."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 2, 3, padding=1)
        self.register_buffer("dense_prompt", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)  # type: ignore[no-any-return]


def test_windows_leave_no_seams() -> None:
    """Where windows overlap, the result of a model that sees few pixels is that of the whole image."""
    model, pixels = Edges(), np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    colors = {"a": [0, 0, 0], "b": [1, 1, 1]}
    whole = Predictor(model, SquareResize(300), colors, torch.no_grad)  # type: ignore[arg-type]
    cut = TiledSegmenter(model, SquareResize(128), Tiling(128, 0.25), batch_size=4)  # type: ignore[arg-type]
    with torch.no_grad():
        [expected] = whole.logits([whole.prepare(pixels)], [(300, 300)])
        found = cut(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    assert len(Grid(300, 300, Tiling(128, 0.25)).windows) == 9
    assert (found - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("resize", [SquareResize(32), LongestSideResize(32)])
def test_a_short_side_is_mirrored_so_that_windows_keep_their_scale(
    resize: SquareResize | LongestSideResize,
) -> None:
    """Five bright rows are five in the network's input, and come out where they were."""

    class Copy(Edges):
        def forward(self, images: Tensor) -> Tensor:
            bright = (images[:, 0, :20] > 0).all(dim=2)
            assert (bright.sum(dim=1) == 5).all()
            return images[:, :1]

    pixels = np.zeros((20, 100, 3), np.uint8)
    pixels[5:10] = 255
    cut = TiledSegmenter(Copy(), resize, Tiling(32), batch_size=2)  # type: ignore[arg-type]
    logits = cut(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0, 0]
    assert logits.shape == (20, 100)
    assert torch.equal(logits > 0, torch.from_numpy(pixels[..., 0] > 0))


def test_an_image_that_one_window_holds_is_seen_whole_as_in_training() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 31, 3), np.uint8)
    whole = Predictor(Edges(), SquareResize(32), {}, torch.no_grad)  # type: ignore[arg-type]
    cut = TiledSegmenter(Edges(), SquareResize(32), Tiling(32), batch_size=2)  # type: ignore[arg-type]
    with torch.no_grad():
        [expected] = whole.logits([whole.prepare(pixels)], [(20, 31)])
        assert torch.allclose(cut(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (8, 0.25, "tile=8 must be at least 16"),
        (64, 0.0, "overlap=0.0 must lie above 0"),
        (64, 0.6, "overlap=0.6 must lie above 0 and be at most 0.5"),
        (None, 0.25, "RUN does not say how large its training images were; set tile=PIXELS"),
    ],
)
def test_impossible_windows_are_refused(tile: int | None, overlap: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_tiling(tile, overlap, None, "RUN")


def test_windows_are_as_large_as_the_images_that_were_trained_on() -> None:
    assert choose_tiling(None, 0.25, 300, "RUN").side == 300
    assert choose_tiling(64, 0.25, 300, "RUN").side == 64


def test_a_window_larger_than_every_image_is_refused() -> None:
    check_tile(64, [(Path("a"), (10, 20)), (Path("b"), (64, 5))])
    with pytest.raises(ValueError, match=r"tile=64 is larger than the images \(a has 10 x 20 pixels\)"):
        check_tile(64, [(Path("a"), (10, 20)), (Path("b"), (5, 63))])
