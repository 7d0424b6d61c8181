from pathlib import Path

import numpy as np
import pytest

from convlora.callbacks import PREDICTION, TRUTH, draw_contours, error_map, finish_wandb, wandb_logger


def test_wandb_is_offline_and_silent_where_nobody_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a login"))
    finish_wandb()
    run = wandb_logger("convlora", "group", str(tmp_path)).experiment
    try:
        assert run.offline
        assert run.project == "convlora"
        assert run.group == "group"
    finally:
        finish_wandb()


def test_error_map_marks_missed_and_false_pixels() -> None:
    image = np.full((2, 2, 3), 90, np.uint8)
    mask = np.array([[1, 1], [0, 0]], np.uint8)
    prob = np.array([[128, 127], [128, 127]], np.uint8)
    picture = error_map(image, mask, prob)
    assert tuple(picture[0, 1]) == TRUTH
    assert tuple(picture[1, 0]) == PREDICTION
    assert (picture[[0, 1], [0, 1]] == 30).all()


def test_contours_outline_the_mask_and_leave_the_rest_alone() -> None:
    image = np.full((40, 40, 3), 100, np.uint8)
    found = np.zeros((40, 40), bool)
    found[10:30, 10:30] = True
    picture = draw_contours(image, found)
    assert tuple(picture[10, 15]) == PREDICTION
    assert (picture[:8] == 100).all()
    assert (image == 100).all()
