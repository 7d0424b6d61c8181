"""conf/ as Hydra reads it."""

import hydra
from conftest import ROOT
from omegaconf import DictConfig

import convlora.build  # noqa: F401  # brings what conf/ computes with


def names(group: str) -> list[str]:
    """The files of a group."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def compose(name: str, *overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """conf/<name>.yaml with the defaults that it names."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(name, list(overrides), return_hydra_config)
