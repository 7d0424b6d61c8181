"""Trainings in processes of their own, which a test can stop."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from conftest import Finished

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["convlora.train"])  # seconds of imports, once for all


def _run(
    module: str, folder: Path, arguments: tuple[str, ...], variables: dict[str, str], out: Path, err: Path
) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as a command has it on Linux
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background would ignore
    os.environ.pop("WANDB_SERVICE", None)  # of the tests, where W&B holds a killed run for a while
    os.environ |= {"WANDB_MODE": "offline", **variables}
    os.setsid()
    os.chdir(folder)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    sys.argv = [module, *arguments]
    command = importlib.import_module(module)
    sys.modules["__main__"].__spec__ = command.__spec__  # of which Lightning starts further processes
    command.main()


@dataclass
class Training:
    """`python -m convlora.train ARGUMENTS` in a folder, leading a process group of its own.

    Another command may take its place, and variables of the environment be given.
    """

    folder: Path
    arguments: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    module: str = "convlora.train"

    def __post_init__(self) -> None:
        self.out, self.err = (self.folder / f"{id(self)}.{stream}" for stream in ("out", "err"))
        given = (self.module, self.folder, self.arguments, self.variables, self.out, self.err)
        self.process = CONTEXT.Process(target=_run, args=given)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def until(self, reached: Callable[[], bool], seconds: float = 120) -> "Training":
        deadline = time.monotonic() + seconds
        while not reached():
            assert self.process.is_alive(), self.ended().err
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return self

    def kill(self) -> None:
        """End it as a machine that fails does; its loader processes live on until they notice."""
        self.process.kill()
        self.process.join()

    def ended(self, seconds: float = 120) -> Finished:
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it does not end"
        done = Finished(self.process.exitcode, self.out.read_text(), self.err.read_text())
        self.out.unlink()
        self.err.unlink()
        return done
