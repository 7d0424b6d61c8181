"""Python that a user copies, from the README and from docstrings, runs as it is written."""

import ast
import importlib
import inspect
import pkgutil
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL, train_in
from PIL import Image

import convlora
from convlora.data.images import IMAGE_SUFFIXES
from convlora.data.sets.synthetic import draw_scene

PAGES = ("README.md", "data/README.md", "CONTRIBUTING.md")
FEW = ("trainer.max_epochs=1", "dataset.train_size=2", "dataset.val_size=1", "dataset.test_size=1")


def blocks(text: str) -> Iterator[str]:
    """The indented and the fenced blocks of a page that are Python and import something."""
    fenced = re.findall(r"^```(?:python|py)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\n(?:[ \t]*\n(?= {4}))?)+", text, re.MULTILINE)
    for block in map(textwrap.dedent, [*fenced, *indented]):
        if re.search(r"^(from|import) \w", block, re.MULTILINE):
            yield block


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(convlora.__path__, "convlora."):
        if found.name != "convlora.panels":  # which needs a package of its own
            yield importlib.import_module(found.name)


def calls(module: ModuleType) -> Iterator[str]:
    """The calls in a module's docstrings that say all that they need: `load("RUN")`, not `adapt(layer)`."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for span in re.findall(r"`([^`]+)`", ast.get_docstring(node) or ""):
                try:
                    parsed = ast.parse(span, mode="eval")
                except SyntaxError:
                    continue
                inside = list(ast.walk(parsed))
                known = all(hasattr(module, each.id) for each in inside if isinstance(each, ast.Name))
                told = [each for each in inside if isinstance(each, ast.Call) and each.args]
                if known and told and isinstance(parsed.body, ast.Call):
                    yield span


SNIPPETS = [
    *((f"{page}:{number}", text, None) for page in PAGES
      for number, text in enumerate(blocks((ROOT / page).read_text()))),
    *((f"{module.__name__}:{text}", text, module) for module in modules() for text in calls(module)),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("snippets"), *SMALL, *FEW, "logger=csv")


def plant(text: str, run: Path) -> None:
    """Make what a snippet names: runs by capital letters, images by their suffix."""
    for node in ast.walk(ast.parse(text)):
        name = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if re.fullmatch(r"[A-Z_]*RUN", name):
            shutil.copytree(run, name)
        elif Path(name).suffix in IMAGE_SUFFIXES:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_scene(np.random.default_rng(len(name)), 40)[0]).save(name)


def test_the_interface_is_among_the_snippets() -> None:
    texts = [text for _, text, _ in SNIPPETS]
    assert sum('predict("photo.jpg")' in text for text in texts) >= 2, "of the README and of a docstring"


@pytest.mark.parametrize(
    ("text", "module"), [snippet[1:] for snippet in SNIPPETS], ids=[snippet[0] for snippet in SNIPPETS]
)
def test_a_snippet_runs_as_it_is_written(
    text: str, module: ModuleType | None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plant(text, run)
    names: dict[str, Any] = dict(vars(module)) if module else {}
    exec(compile(text, "snippet", "exec"), names)
