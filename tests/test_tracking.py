import json
from pathlib import Path

import pytest

from convlora.run import write_json
from convlora.tracking import finish_wandb, wandb_logger


def test_wandb_is_offline_and_silent_where_nobody_is_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a login"))
    finish_wandb()
    given = ("convlora", "group", "a name", "train", ["a", "tag"], str(tmp_path))
    ids = []
    for _ in range(2):  # the second time as a run that goes on
        run = wandb_logger(*given).experiment
        try:
            ids.append(run.id)
            assert run.offline
            assert (run.project, run.group, run.name) == ("convlora", "group", "a name")
            assert (run.job_type, run.tags) == ("train", ("a", "tag"))
        finally:
            finish_wandb()
    assert ids[0] == ids[1]


def test_what_is_no_number_is_null_in_json(tmp_path: Path) -> None:
    write_json(
        tmp_path / "a.json", {"miou": 0.5, "sets": {"aerial": {"iou_roof": float("nan"), "images": 3}}}
    )
    text = (tmp_path / "a.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"miou": 0.5, "sets": {"aerial": {"iou_roof": None, "images": 3}}}
