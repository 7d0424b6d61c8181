import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from hatchling.builders.wheel import WheelBuilder


@pytest.mark.slow
def test_an_installed_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    """The configuration travels with the package, and nothing is taken from the checkout."""
    builder = WheelBuilder(str(ROOT))
    [wheel] = builder.build(directory=str(tmp_path), versions=["standard"])
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = "import convlora; print(convlora.__file__); from convlora.train import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "dry_run=true", "model=sam_vit_b"],
        check=True,
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert str(site) in done.stdout
    assert "trainable of" in done.stdout
