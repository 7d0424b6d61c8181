"""conf/ as Hydra reads it."""

import hydra
import yaml
from conftest import ROOT
from omegaconf import DictConfig

import convlora.build  # noqa: F401  # brings what conf/ computes with


def names(group: str) -> list[str]:
    """The files of a group."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


def loss_of(head: str) -> str:
    """The loss that conf/head/<head>.yaml chooses, else the one of several classes."""
    defaults = yaml.safe_load((ROOT / f"conf/head/{head}.yaml").read_text()).get("defaults", [])
    chosen = {key.partition("@")[0]: value for each in defaults for key, value in each.items()}
    loss: str = chosen.get("override /loss", "cross_entropy_dice")
    return loss


def compose(name: str, *overrides: str, return_hydra_config: bool = False) -> DictConfig:
    """conf/<name>.yaml with the defaults that it names."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(name, list(overrides), return_hydra_config)
