"""The interpreter that `make setup` takes; the ones here are scripts that print a version."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("make", "mkdir", "rm", "touch", "chmod")
FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo "Python {version}"; exit; fi
mkdir -p .venv/bin
for tool in pip python; do echo '#!/bin/sh' > .venv/bin/$tool; chmod +x .venv/bin/$tool; done
echo {name} > chosen
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


class Checkout:
    """A folder with the Makefile, whose PATH has the named interpreters alone."""

    def __init__(self, folder: Path, versions: dict[str, str]):
        self.folder, self.tools = folder / "checkout", folder / "tools"
        for made in (self.folder, self.tools):
            made.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder)
        for tool in TOOLS:
            (self.tools / tool).symlink_to(str(shutil.which(tool)))
        for name, version in versions.items():
            path = self.tools / name
            path.write_text(FAKE.format(name=name, version=version))
            path.chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "MAKEFLAGS")}
        environment = {**kept, "PATH": str(self.tools)}
        command = [str(self.tools / "make"), *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    @property
    def chosen(self) -> str:
        return (self.folder / "chosen").read_text().strip()


@pytest.mark.parametrize(
    ("versions", "expected"),
    [
        ({"python3.13": "3.13.1", "python3.11": "3.11.9", "python3": "3.11.9"}, "python3.13"),
        ({"python3.12": "3.12.0rc1", "python3": "3.14.0"}, "python3.12"),
        ({"python3.11": "3.11.2", "python3": "3.9.6"}, "python3.11"),
        ({"python3": "3.12.7"}, "python3"),
        ({"python3.13": "3.8.10", "python3": "3.11.0"}, "python3"),
    ],
)
def test_setup_takes_the_first_interpreter_that_fits(
    tmp_path: Path, versions: dict[str, str], expected: str
) -> None:
    checkout = Checkout(tmp_path, versions)
    done = checkout.make("setup")
    assert done.returncode == 0, done.stderr
    assert checkout.chosen == expected


@pytest.mark.parametrize("versions", [{}, {"python3": "3.14.0"}, {"python3": "3.10.4"}, {"python3": "3.1.2"}])
def test_setup_says_in_one_line_which_python_is_missing(tmp_path: Path, versions: dict[str, str]) -> None:
    checkout = Checkout(tmp_path, versions)
    environment = checkout.folder / ".venv"
    environment.mkdir()
    done = checkout.make("setup")
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert line == (
        "convlora needs Python 3.11, 3.12 or 3.13 (hydra 1.3 does not run on 3.14), but none is on the PATH; "
        "set PYTHON=..."
    )
    assert environment.is_dir()  # the one that was there is not lost
    assert not (checkout.folder / "chosen").exists()


def test_an_interpreter_that_is_given_wins(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, {"python3.13": "3.13.1", "mine": "3.11.4"})
    done = checkout.make("setup", "PYTHON=mine")
    assert done.returncode == 0, done.stderr
    assert checkout.chosen == "mine"


@pytest.mark.parametrize("version", ["3.14.0", None])
def test_an_interpreter_that_is_given_is_checked(tmp_path: Path, version: str | None) -> None:
    checkout = Checkout(tmp_path, {"python3.13": "3.13.1", **({"mine": version} if version else {})})
    for target in ("setup", "train"):
        done = checkout.make(target, "PYTHON=mine")
        assert done.returncode != 0
        assert "PYTHON=mine is none of them" in done.stderr
    assert not (checkout.folder / "chosen").exists()
