"""The command line: compose conf/, call the job, tell mistakes in one line."""

import difflib
import hashlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from convlora.build import CONF, Config, check_keys, resolve

T = TypeVar("T")

# What a user can mend; anything else is a defect and keeps its traceback.
USER_ERRORS = (
    OSError,
    ValueError,
    FloatingPointError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
)
FOLDER_NAME = 120  # characters of a sweep's folder at most
# Values that may be written without quotes, in hydra's grammar and in a shell's
PLAIN = re.compile(r"[\w./-]+")


def command(
    config_name: str,
    schema: Callable[..., T],
    job: Callable[[T], Any],
    folder: str | None = None,
    replay: Callable[[str], list[str]] | None = None,
) -> Callable[[], None]:
    """Return a command-line entry point: compose conf/<config_name>.yaml and call `job(schema(**config))`.

    The schema's signature is that of the file's top level. A mistake of the user's ends in one line on stderr
    and exit code 1; HYDRA_FULL_ERROR=1 shows the traceback.

    Args:
        config_name: of the file.
        schema: of its top level.
        job: what is done.
        folder: key of the folder that it writes to; that of a sweep's job is the sweep's.
        replay: returns the arguments of the run in `resume=FOLDER`, which the given ones follow.
    """

    def main() -> None:
        _quiet()
        full = os.environ.get("HYDRA_FULL_ERROR", "0")

        def run(cfg: DictConfig) -> Any:
            try:
                config = check_keys("", schema, resolve(cfg))
                if folder is not None and HydraConfig.get().mode == RunMode.MULTIRUN:
                    config[folder] = HydraConfig.get().runtime.output_dir
                given = [] if folder is None else [assign(folder, config[folder])]
                # for the processes of further devices, which Lightning starts with the arguments of this one
                sys.argv[1:] = [*_options(sys.argv[1:]), *HydraConfig.get().overrides.task, *given]
                return job(schema(**config))
            except USER_ERRORS as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:  # whose other jobs go on
                    raise
                sys.exit(_explain(error, full != "0"))  # past hydra, which would add a line of its own

        os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra hands its exceptions on instead of printing them
        try:
            sys.argv[1:] = _loosen(_replay(sys.argv[1:], replay))
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(run)()
        except (MissingConfigException, ConfigCompositionException) as error:
            sys.exit(_explain(_name_choice(config_name, error), full != "0"))
        except USER_ERRORS as error:
            sys.exit(_explain(error, full != "0"))
        finally:
            os.environ["HYDRA_FULL_ERROR"] = full

    return main


def given_overrides() -> list[str]:
    """Return the arguments of this job that set a value or choose a file, as a user writes them."""
    options = [f"--config-dir={Path(path).resolve()}" for path in _config_dirs(sys.argv[1:])]
    return [*options, *(override.lstrip("+") for override in HydraConfig.get().overrides.task)]


def assign(key: str, value: object) -> str:
    """Return the argument that sets a key to a value, whatever characters the value has."""
    text = str(value)
    if PLAIN.fullmatch(text):
        return f"{key}={text}"
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{quoted}'"


def folder_name(overrides: str) -> str:
    """Return a folder's name made of a sweep's overrides: letters, digits, `.`, `_` and `-` only.

    What cannot be kept, and what is too long, leaves a hash behind, so that two jobs never share a folder.
    """
    plain = overrides.replace("+", "").replace("=", "-").replace(",", "_").replace("/", ".")
    name = re.sub(r"[^A-Za-z0-9._-]", "", plain)
    if name == plain and len(name) <= FOLDER_NAME:
        return name or "defaults"
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name[: FOLDER_NAME - 9]}-{digest}"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def _replay(arguments: list[str], replay: Callable[[str], list[str]] | None) -> list[str]:
    """Put the arguments of the run that is resumed before those given now, which win."""
    found = [argument for argument in arguments if replay is not None and argument.startswith("resume=")]
    path = found[-1].partition("=")[2].strip("'\"").replace("\\'", "'").replace("\\\\", "\\") if found else ""
    if replay is None or path in ("", "null"):
        return arguments
    given = {_key(argument) for argument in arguments}
    recorded = [argument for argument in replay(path) if _key(argument) not in given]
    return [*_options(recorded), *_options(arguments), *_overrides(recorded), *_overrides(arguments)]


def _loosen(arguments: Sequence[str]) -> list[str]:
    """Let every value be set, known to the file or not; a typed constructor refuses what it does not take.

    Hydra would advise to put a + before a misspelt key.
    """
    folders = [CONF, *map(Path, _config_dirs(arguments))]

    def loosen(argument: str) -> str:
        key = argument.partition("=")[0]
        is_group = any((folder / key).is_dir() for folder in folders)
        if not re.fullmatch(r"\+*\w+(\.[\w+-]+)*", key) or key.startswith("hydra.") or is_group:
            return argument
        return f"++{argument.lstrip('+')}"

    return [*_options(arguments), *map(loosen, _overrides(arguments))]


def _options(arguments: Sequence[str]) -> list[str]:
    """Return what is no override: hydra's own options, each with its value."""
    overrides = _overrides(arguments)
    return [argument for argument in arguments if argument not in overrides]


def _overrides(arguments: Sequence[str]) -> list[str]:
    previous = ["", *arguments]
    return [
        argument
        for before, argument in zip(previous, arguments, strict=False)
        if not argument.startswith("-") and ("=" in argument or argument.startswith("~"))
        and before not in ("--config-dir", "-cd", "--package", "-p")
    ]  # fmt: skip


def _config_dirs(arguments: Sequence[str]) -> list[str]:
    following = [*arguments[1:], ""]
    return [
        argument.partition("=")[2] or after
        for argument, after in zip(arguments, following, strict=True)
        if argument.partition("=")[0] in ("--config-dir", "-cd")
    ]


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _name_choice(config_name: str, error: HydraException) -> Exception:
    """Say in one line which file or group does not exist, and what there is."""
    missing = getattr(error, "missing_cfg_file", None)
    if missing:
        group, _, name = str(missing).rpartition("/")
        names = sorted(getattr(error, "options", None) or ())
        return ValueError(f"{group}={name}: there is none of that name; {_suggest(name, names)}")
    found = re.match(r"Could not override '([^'@]+)", str(error))
    if found and found[1].startswith("peft/"):
        return ValueError(f"{found[1]}=... is for methods with experts, as in peft=conv_lora; leave it out")
    if found:
        groups = sorted(path.name for path in CONF.iterdir() if path.is_dir())
        close = _suggest(found[1], [group for group in groups if group != found[1]])
        return ValueError(f"{config_name} takes no {found[1]}=...; see --help ({close})")
    return error


def _suggest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"there are {', '.join(names)}"


def _explain(error: Exception, full: bool) -> str:
    """Return the line that tells a user of an error; `full` also prints the traceback."""
    if full:
        traceback.print_exc()
    message = str(error)
    if message.startswith("Caught "):  # a loader process wraps its error in a traceback
        message = message.rstrip().splitlines()[-1].partition("Error: ")[2]
    elif isinstance(error, MissingMandatoryValue):
        message = f"{error.full_key} must be given; write {error.full_key}=VALUE"
    elif isinstance(error, OmegaConfBaseException):  # what follows are its internals
        message = message.splitlines()[0]
    return f"error: {' '.join(message.split())}"


def _quiet() -> None:
    """Leave the terminal to the command's own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        "Found .* in eval mode at the start of training",  # the frozen ones are meant to be
        "The number of training batches .* is smaller than the logging interval",
        "It is recommended to use .self.log.*sync_dist",  # the scores are already those of all ranks
        "You passed .* but AMP with fp16 is not supported on CPU",  # said by `build.say_precision`
        "Experiment logs directory",
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=message)


__all__ = ["Config", "assign", "command", "given_overrides"]
