import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

from convlora.callbacks import Vitals
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


def test_the_rate_of_images_counts_those_of_the_step_that_is_logged() -> None:
    """Also of the first, where every step is."""
    logged: list[float] = []

    class Kept(DummyLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            logged.append(metrics["train/images_per_second"])

    class Step(LightningModule):
        def log(self, *_: Any, **__: Any) -> None: ...

    trainer, step, vitals = Trainer(logger=Kept(), log_every_n_steps=1, accelerator="cpu"), Step(), Vitals()
    batch: Any = SimpleNamespace(images=range(4))
    vitals.on_train_epoch_start(trainer, step)
    for number in range(2):
        vitals.on_train_batch_start(trainer, step, batch, number)
        vitals.on_before_optimizer_step(trainer, step, None)
    assert min(logged) > 0
    assert len(logged) == 2
