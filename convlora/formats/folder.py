"""The folder that an export makes: there as a whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILES = (".onnx", ".pt2", ".pt", ".pth", ".safetensors")  # suffixes of what lies inside
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder beside `output` to write to, which takes that name once all is written.

    Raises:
        OSError: it cannot be made, or the disk is full; what had been written is removed.
        ValueError: `output` is there already, or is called like a file.
    """
    if output.suffix in FILES:
        raise ValueError(f"output={output} is to be a folder; write output={output.with_suffix('')}")
    if output.is_symlink() or output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ValueError(f"output={output} is there already; choose another output or remove it")
    new = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"output={output} cannot be made ({error.strerror}); choose another output") from error
    try:
        yield new
        new.replace(output)
    except OSError as error:
        if error.errno in FULL:
            raise full_disk(output, str(error.strerror)) from error
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def full_disk(output: Path, reason: str) -> OSError:
    """Return the error of a disk that has no room for what is written."""
    return OSError(f"the disk of {output.parent} is full ({reason}); free some, or choose another output")
