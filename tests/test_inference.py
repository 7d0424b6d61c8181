"""The Python interface: a run's folder in, predictions of images of any size out."""

from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, Commands
from PIL import Image

from convlora import predict, train
from convlora.adapter import load


def test_a_run_predicts_in_python_what_the_command_writes(cli: Commands) -> None:
    assert cli(train, *SMALL, "logger=csv", "run_dir=run", "trainer.max_epochs=1").code == 0
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (*size, 3), np.uint8) for size in ((30, 50), (64, 20), (1, 200))]
    for index, each in enumerate(pixels):
        Path("in").mkdir(exist_ok=True)
        Image.fromarray(each).save(f"in/{index}.png")
    done = cli(predict, "checkpoint=run", "input=in", "output=out", "probabilities=true", "num_workers=0",
               "batch_size=1")  # fmt: skip
    assert done.code == 0, done.err
    predictor = load("run", device="cpu")
    assert predictor.class_colors == {"object": [0, 255, 255]}
    for index, each in enumerate(pixels):
        prob = np.asarray(Image.open(f"out/probabilities/{index}.png"))
        for given in (each, Image.fromarray(each), f"in/{index}.png", Path(f"in/{index}.png")):
            found = predictor.predict(given)
            assert found.classes.shape == each.shape[:2]
            assert np.array_equal(found.prob, prob)
            assert np.array_equal(found.classes, prob >= 128)
    for wrong in (pixels[0] / 255, pixels[0][..., 0], pixels[0][..., :2]):
        with pytest.raises(ValueError, match=r"but pixels are uint8 \[h, w, 3\], RGB; convert it"):
            predictor.predict(wrong)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        predictor.predict("nowhere.png")
    with pytest.raises(ValueError, match=r"device=tpu9000 .* cannot be used"):
        load("run", device="tpu9000")
