"""Files of pretrained weights: fetched, verified, read without running code, held against a model."""

import hashlib
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from convlora import fetch as files
from convlora.fetch import hash_file as hash_file


def fetch(name: str, url: str) -> Path:
    """Return the file of an official checkpoint in torch.hub's cache, downloaded where it is not there yet.

    Official names end in the first digits of the file's SHA-256, which is checked here.

    Raises:
        OSError: the download failed.
        ValueError: the file has another hash.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    published = re.search(r"_([0-9a-f]{6,})\.\w+$", path.name)
    try:
        return files.fetch(name, url, path, published and published.group(1))
    except (OSError, ValueError) as error:
        raise type(error)(f"{error}, or set model.weights=PATH") from error


def cached(url: str) -> Path:
    """Return where `fetch` keeps the file of a URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def read(name: str, path: Path, way_out: str = "take the official checkpoint") -> dict[str, Tensor]:
    """Read a file of tensors; anything else in it, code above all, is refused and never run.

    Args:
        name: of what is read, for messages.
        path: a safetensors file, or a pickle whose tensors may lie under `state_dict`.
        way_out: what to do where the file holds something else.

    Raises:
        ValueError: the file is damaged or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name}: {path} is not a plain file of tensors (truncated, or a pickle that could run code) and "
            f"was not loaded; {way_out}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        reason = "" if isinstance(error, KeyError) else f" {_first_line(error)}"  # a byte of the file
        raise ValueError(f"{name}: {path} is truncated or damaged; fetch it again.{reason}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{name}: {path} holds no dictionary of tensors; {way_out}")
    return state


def write(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a file of tensors that `read` takes."""
    new = path.with_name(f"{path.name}.new")
    torch.save(dict(state), new)
    new.replace(path)


def check_fit(name: str, path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare a checkpoint's keys and shapes with a model's.

    Raises:
        ValueError: they differ, so the file is of another model.
    """
    if problems := mismatches(state, expected):
        raise ValueError(
            f"{name}: {path} holds another model; of {len(expected)} tensors, {problems}. "
            "Take the checkpoint of this backbone, or the model= that the file belongs to"
        )


def mismatches(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return how names and shapes differ, with the first of each kind; nothing where they do not."""
    reshaped = {
        f"{name} is {list(found[name].shape)} where {list(expected[name].shape)} is expected"
        for name in found.keys() & expected.keys()
        if found[name].shape != expected[name].shape
    }
    kinds = {
        "missing": expected.keys() - found.keys(),
        "unknown": found.keys() - expected.keys(),
        "of another shape": reshaped,
    }
    return ", ".join(f"{len(those)} {kind} (first {min(those)})" for kind, those in kinds.items() if those)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def hash_tensors(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, types and values, hexadecimal."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {math.prod(value.shape)}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
