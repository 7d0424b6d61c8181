"""The command line: compose conf/, call the job, tell mistakes in one line."""

import hashlib
import inspect
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from hydra.utils import get_object
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from convlora.build import CONF
from convlora.run import RECORD, assign, in_shell, is_requeued
from convlora.schema import check_keys, resolve, suggest
from convlora.sweep import attempt

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
NO_SETTINGS = ("resume", "run_dir", "sweep", "sweep_dir")
FOLDER_NAME = 120  # characters of a sweep's folder at most


def command(
    config_name: str,
    schema: Callable[..., T],
    job: Callable[[T], Any],
    folder: str | None = None,
    replay: Callable[[str], list[str]] | None = None,
    rejoin: Callable[[T], Any] | None = None,
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
        rejoin: what is done in place of the job by one of a sweep in whose folder a run has been.
    """

    def main() -> None:
        program = sys.argv[0]
        full = os.environ.get("HYDRA_FULL_ERROR", "0")

        def run(cfg: DictConfig) -> Any:
            _quiet()

            def explain(error: Exception) -> str:
                return _explain(error, full != "0" or not isinstance(error, USER_ERRORS))

            if HydraConfig.get().mode == RunMode.MULTIRUN:
                output = HydraConfig.get().runtime.output_dir
                return attempt(Path(output), lambda: run_job(cfg, output), explain)
            try:
                return run_job(cfg, None)
            except USER_ERRORS as error:
                sys.exit(explain(error))  # past hydra, which would add a line of its own

        def run_job(cfg: DictConfig, output: str | None) -> Any:
            _refuse_deleted(cfg)
            if output is None and HydraConfig.get().sweeper.params:
                raise ValueError("sweep=... is for several runs; add -m")
            known = inspect.signature(schema).parameters
            # a misspelt key is told before the one that is missing for it
            check_keys("", schema, {str(key): None for key in cfg if key not in known})
            config = check_keys("", schema, resolve(cfg))
            if folder is not None and output is not None:
                config[folder] = output
            given = [] if folder is None else [assign(folder, config[folder])]
            if output is None and folder is not None and is_requeued() and not config.get("resume"):
                output = config[folder]  # where the run is that this command began before
            begun = rejoin is not None and output is not None and (Path(output) / RECORD).is_file()
            if begun:
                config["resume"] = output
            if config.get("resume"):
                given.append(assign("resume", config["resume"]))
            # for the processes of further devices, which Lightning starts with the arguments of this one; a
            # launcher's process has arguments of its own
            sys.argv[:] = [program, *_surroundings(arguments), *_settings(), *given]
            return (rejoin if rejoin is not None and begun else job)(schema(**config))

        os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra hands its exceptions on instead of printing them
        try:
            sys.argv[1:] = arguments = _loosen(_replay(sys.argv[1:], replay))
            _refuse_emptied(sys.argv[1:], schema)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(run)()
        except (MissingConfigException, ConfigCompositionException) as error:
            sys.exit(_explain(_name_choice(config_name, error), full != "0"))
        except USER_ERRORS as error:
            sys.exit(_explain(error, full != "0"))
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = full

    return main


def given_overrides() -> list[str]:
    """Return the arguments of this job that set a value or choose a file, as a user writes them."""
    return [*_surroundings(sys.argv[1:]), *(each.removeprefix("++") for each in _settings())]


def _settings() -> list[str]:
    """Return the arguments of this job, less those that say where and among which others it runs."""
    return [each for each in HydraConfig.get().overrides.task if _key(each) not in NO_SETTINGS]


def _surroundings(arguments: Sequence[str]) -> list[str]:
    """Return the options by which hydra finds the files of a command."""
    given = get_args_parser().parse_intermixed_args(arguments)
    folder = [] if given.config_dir is None else [f"--config-dir={Path(given.config_dir).resolve()}"]
    name = [] if given.config_name is None else [f"--config-name={given.config_name}"]
    paths = [each for each in HydraConfig.get().overrides.hydra if _key(each) == "hydra.searchpath"]
    return [*folder, *name, *paths]


def refuse_idle(*prefixes: str) -> None:
    """Refuse arguments that this command has no use for, by the beginning of their keys.

    Raises:
        ValueError: one of them is given.
    """
    for argument in given_overrides():
        key = argument.lstrip("+~").partition("=")[0]
        if key != "model.weights" and any(key == each or key.startswith(f"{each}.") for each in prefixes):
            raise ValueError(f"{key} has no effect here, the adapter brings its own; leave it out")


def folder_name(overrides: str) -> str:
    """Return a folder's name made of a sweep's overrides: letters, digits, `.`, `_` and `-` only.

    What cannot be kept, and what is too long, leaves a hash behind, so that two jobs never share a folder.
    """
    plain = overrides.replace("+", "").replace("=", "-").replace(",", "_").replace("/", ".")
    name = re.sub(r"[^A-Za-z0-9._-]", "", plain).lstrip(".-")
    values = (override.partition("=")[2] for override in overrides.split(","))
    kept = all(re.fullmatch(r"[A-Za-z0-9._-]+", value) for value in values)
    if not overrides or (kept and name == plain and len(name) <= FOLDER_NAME):
        return name or "defaults"
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name[: FOLDER_NAME - 9]}-{digest}".lstrip("-")


def run_name(overrides: str) -> str:
    """Return what a run is called that has these overrides of a job."""
    return overrides.replace("+", "").replace(",", " ") or "defaults"


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def _replay(arguments: list[str], replay: Callable[[str], list[str]] | None) -> list[str]:
    """Put the arguments of the run that is resumed before those given now, which win."""
    options, given = _split(arguments)
    values = {_key(argument): argument.partition("=")[2] for argument in given}
    folder = values.get("resume", "")
    if replay is None or folder in ("", "null"):
        return arguments
    if get_args_parser().parse_intermixed_args(arguments).multirun:
        raise ValueError(f"resume={folder} goes on with one run; leave out -m")
    if folder[0] in "'\"":
        folder = str(OverridesParser.create().parse_override(f"resume={folder}").value())
    recorded, before = _split(replay(folder))
    before = [each for each in before if _key(each) not in values]
    now = [each for each in given if _key(each) != "resume"]
    return [*recorded, *options, *before, *now, assign("resume", folder)]


def _loosen(arguments: Sequence[str]) -> list[str]:
    """Let every value be set, known to the file or not; a typed constructor refuses what it does not take.

    Hydra would advise to put a + before a misspelt key.
    """
    options, given = _split(arguments)
    folders = [CONF, *map(Path, _config_dir(arguments))]

    def loosen(argument: str) -> str:
        key = _key(argument)
        is_group = any((folder / key).is_dir() for folder in folders)
        is_value = re.fullmatch(r"(?!hydra\.)\w+(\.[\w+-]+)*", key) and argument[0] != "~" and not is_group
        return f"++{argument.lstrip('+')}" if is_value else argument

    return [*options, *map(loosen, given)]


def _refuse_emptied(arguments: Sequence[str], schema: Callable[..., Any]) -> None:
    """Refuse to take away what the command needs as a whole, or to set it to a number; raises ValueError."""
    needed = inspect.signature(schema).parameters
    for argument in _split(arguments)[1]:
        key, _, value = argument.partition("=")
        if key[:1] == "~" and key[1:] in needed:
            raise ValueError(f"{key} takes away what the command needs; leave it out, or set {key[1:]}=...")
        if value == "null" and key not in ("experiment", "sweep") and (CONF / key).is_dir():
            names = sorted(path.stem for path in (CONF / key).glob("*.yaml"))
            raise ValueError(f"{key}=null leaves nothing to build; {suggest('', names)}")
        if value and (CONF / key).is_dir() and _is_number(argument):
            files = sorted((CONF / key).glob("*.yaml"))
            settings = [str(name) for name in OmegaConf.load(files[0]) if str(name)[0] != "_"]
            setting = settings[0] if len(files) == len(settings) == 1 else "NAME"
            raise ValueError(
                f"{key}={value} names no file of conf/{key}; {suggest('', [path.stem for path in files])}; a "
                f"setting in it is given as {key.replace('/', '.')}.{setting}={value}"
            )


def _is_number(argument: str) -> bool:
    """Return whether the value of an argument is a number or a truth value, and no text."""
    return isinstance(OverridesParser.create().parse_override(argument).value(), bool | int | float)


def _refuse_deleted(cfg: DictConfig) -> None:
    """Refuse to delete a setting that its target then takes from a default of its own; raises ValueError."""
    for override in HydraConfig.get().overrides.task:
        section, _, name = _key(override).replace("/", ".").rpartition(".")
        config = OmegaConf.select(cfg, section) if override[0] == "~" and section else None
        if not isinstance(config, DictConfig):
            continue
        if name == "_target_":
            raise ValueError(f"~{section}._target_ leaves nothing to build; leave it out")
        if "_target_" in config and name in inspect.signature(get_object(config["_target_"])).parameters:
            raise ValueError(
                f"~{section}.{name} would leave {name} to a default of {config['_target_']}; write "
                f"{section}.{name}=VALUE"
            )


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return hydra's own options, and the overrides."""
    overrides = get_args_parser().parse_intermixed_args(arguments).overrides
    return [argument for argument in arguments if argument not in overrides], overrides


def _config_dir(arguments: Sequence[str]) -> list[str]:
    folder = get_args_parser().parse_intermixed_args(arguments).config_dir
    return [] if folder is None else [folder]


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _name_choice(config_name: str, error: HydraException) -> Exception:
    """Say in one line which file or group does not exist, and what there is."""
    missing = str(getattr(error, "missing_cfg_file", None) or "")
    if missing:
        parent = missing.rpartition("/")[0]
        typed = (key for key in map(_key, sys.argv[1:]) if missing.startswith(f"{key}/"))
        group = max(typed, key=len, default=parent)
        name = missing.removeprefix(f"{group}/")
        names = sorted(getattr(error, "options", None) or ())
        if group != parent:  # hydra tells what the group holds, not the folder in it
            paths = (path.relative_to(CONF / group) for path in (CONF / parent).glob("*.yaml"))
            names = sorted(path.with_suffix("").as_posix() for path in paths)
        return ValueError(f"{group}={name}: there is none of that name; {suggest(name, names)}")
    if found := re.match(r"You must specify '(\w+)'", str(error)):
        names = sorted(path.stem for path in (CONF / found[1]).glob("*.yaml"))
        return ValueError(f"{found[1]}=NAME must be given; there are {', '.join(names)}")
    if found := re.match(r"Could not override '([^'@]+)", str(error)):
        if found[1] == "peft/gate":
            return ValueError(
                f"{found[1]}=... is for methods with experts, as in peft=conv_lora; leave it out"
            )
        defaults = OmegaConf.load(CONF / f"{config_name}.yaml").defaults
        groups = [key for entry in defaults if entry != "_self_" for key in entry if " " not in key]
        groups += ["peft/gate"] if "peft" in groups else []
        hint = suggest(found[1], groups) if groups else "leave it out"
        return ValueError(f"{config_name} takes no {found[1]}=...; {hint}")
    return error


def _explain(error: Exception, full: bool) -> str:
    """Return the line that tells a user of an error; `full` also prints the traceback."""
    if full:
        traceback.print_exc()
    message = plain(error)
    if isinstance(error, MissingMandatoryValue):
        message = f"{error.full_key} must be given; write {error.full_key}=VALUE"
    elif isinstance(error, OmegaConfBaseException):  # what follows are its internals
        message = message.splitlines()[0]
    elif isinstance(error, OverrideParseException) and re.match(r"[^=]+=[^\[{]", error.override):
        key, _, value = error.override.lstrip("+").partition("=")
        message = f"{key}={value} cannot be read; if that is one value, write {in_shell(key, value)}"
    elif isinstance(error, HydraException):  # which quotes arguments as `_loosen` left them
        message = re.sub(r"\+\+(?=\w)|See https://hydra\S+.*", "", message)
    return f"error: {' '.join(message.split())}"


def plain(error: Exception) -> str:
    """Return an error's own words, of which a loader process makes a traceback."""
    message = str(error)
    if message.startswith("Caught "):
        message = re.split(r"^\S*Error: ", message, flags=re.MULTILINE)[-1].strip()
    return message


def _quiet() -> None:
    """Leave the terminal to the command's own lines."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",
        ".*isinstance.treespec, LeafSpec",
        "Found .* in eval mode at the start of training",  # the frozen ones are meant to be
        "The number of training batches .* is smaller than the logging interval",
        "It is recommended to use .self.log.*sync_dist",  # the scores are already those of all ranks
        "You passed .* but AMP with fp16 is not supported on CPU",  # said by `build.say_precision`
        ".*all_gather is deprecated",  # Lightning's own call of it
        "Experiment logs directory",
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=message)
