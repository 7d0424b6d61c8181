"""Config sections, held against the signatures of what they describe, which are the schema, and built."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

Config = dict[str, Any]

LOADING = ("resize", "augment", "batch_size", "num_workers", "shots", "cache")
# Keys of earlier versions, and how the same is said now
MOVED = {
    **{f"dataset.{key}": f"loading.{key}" for key in LOADING},
    "dataset.seed": "seed",
    "peft.top_k": "peft.gate.top_k",
    "model.head": "head",
    "gate": "peft/gate=NAME",
    "early_stopping": "callbacks.early_stopping",
    "ckpt_path": "resume=RUN",
}


def resolve(cfg: DictConfig) -> Config:
    """Return the config with all interpolations resolved."""
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def make(section: str, config: Mapping[str, Any], replaced: Sequence[str] = (), **given: Any) -> Any:
    """Build the object that a config section describes, after checking it against the target's signature.

    Args:
        section: the section's name, for messages.
        config: `_target_` and its arguments.
        replaced: those of its keys in whose place something is given.
        given: further arguments, which the config does not set.

    Raises:
        ValueError: a key that the target does not take, a value of a wrong type, or no such target.
        Exception: what the target raised.
    """
    for key in given:
        if config.get(key) is not None and key not in replaced:
            raise ValueError(f"{section}.{key} is set by the command itself; leave it out")
    check_section(section, {key: value for key, value in config.items() if key not in given})
    try:
        if not given:
            return instantiate(config, _convert_="all")
        # called here, since hydra would take a dataclass among its arguments for a config
        return instantiate({**config, "_partial_": True}, _convert_="all")(**given)
    except (InstantiationException, TypeError) as error:
        cause = error if isinstance(error, TypeError) else error.__cause__ or error
        if isinstance(cause, TypeError | ImportError):
            raise ValueError(f"{section}: {config['_target_']}: {cause}") from cause
        raise cause from None


def check_keys(section: str, target: Callable[..., Any], config: Mapping[str, Any]) -> Config:
    """Return `config` if the target takes every key of it, with a value of its type.

    Raises:
        ValueError: naming the key, what it may have meant and what there is; or the value and its type.
    """
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(config)
    known = [parameter.name for parameter in parameters]
    hints = _hints(target)
    for key, value in config.items():
        path = f"{section}.{key}" if section else key
        if path in MOVED and key not in known:
            raise ValueError(
                f"{path} has another name by now: write {MOVED[path]} in the commands that take it"
            )
        if key not in known:
            where = f"{section}: " if section else ""
            raise ValueError(f"{where}unknown key '{key}'; {suggest(key, known, 'it takes')}")
        if key in hints and "_target_" not in repr(value):  # what is still to be built has no type yet
            _check_type(path, value, hints[key])
    return dict(config)


def suggest(name: str, names: Sequence[str], there: str = "there are") -> str:
    """Say which of the names may have been meant by another one, and what names there are."""
    if not names:
        return f"{there} none"
    close = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"{there} {', '.join(names)}"


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(vars(target).get("__init__", target) if isinstance(target, type) else target)
    except (NameError, TypeError):  # hints that only a type checker can read
        return {}


def _check_type(path: str, value: object, hint: Any) -> None:
    try:
        taken = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except (PydanticUserError, SchemaError, NameError, TypeError):
        return  # no type that a value could be checked against
    except ValidationError as error:
        first = error.errors()[0]
        expected = first.get("ctx", {}).get("class")
        way_out = ""
        if first["type"] in ("list_type", "sequence_str") or expected == "Sequence":
            way_out = f"; write {path}=[{value}]"
        elif first["type"] == "is_instance_of" and isinstance(value, str):  # the file of a group
            way_out = f"; write {path.replace('.', '/')}={value}"
        reason = first["msg"][0].lower() + first["msg"][1:]
        written = "null" if value is None else value
        raise ValueError(f"{path}={written} is not possible: {reason}{way_out}") from error
    if (type(value), type(taken)) in ((float, int), (str, int), (str, float), (str, bool)):
        raise ValueError(f"{path}={value!r} is not possible: it is read as {taken}; write {path}={taken}")


def check_section(section: str, config: Mapping[str, Any]) -> None:
    """Hold a section and those inside it against the signatures of their targets, building nothing.

    Raises:
        ValueError: what `check_keys` refuses, or no such target.
    """
    if "_target_" in config:
        try:
            target = get_object(config["_target_"])
        except (ImportError, ValueError) as error:
            raise ValueError(f"{section}: there is no {config['_target_']} ({error})") from error
        check_keys(section, target, {key: value for key, value in config.items() if not key.startswith("_")})
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_section(f"{section}.{key}", value)
