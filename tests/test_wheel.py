import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_an_installed_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    """The configuration travels with the package, and nothing is taken from the checkout."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    [wheel] = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
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
