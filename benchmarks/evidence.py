"""What a training step of each form compared in docs/evidence costs: `python -m benchmarks.evidence`.

Random weights, and frozen ones held in bf16; over plain LoRA's step.
"""

import argparse
import statistics

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.measure import alternate, default_device, ratio, report, warm_heap
from benchmarks.step import Setting, label, make_step, memory_on_cpu
from convlora.build import CONF


def forms() -> dict[str, DictConfig]:
    """Return the settings of each form."""
    names = sorted(path.stem for path in (CONF / "experiment/evidence").glob("*.yaml"))
    with initialize_config_dir(str(CONF), version_base=None):
        return {name: compose("train", [f"experiment=evidence/{name}"]) for name in names}


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    configs = forms()
    shared = configs["lora"]
    sizes = (shared.model.image_size, shared.loading.batch_size)
    setting = Setting(shared.model.name, *sizes, "bf16", device=default_device())
    methods = {name: instantiate(config.peft, _convert_="all") for name, config in configs.items()}
    warm_heap()
    taken = alternate(
        {name: make_step(setting, method) for name, method in methods.items()},
        options.rounds,
        setting.device,
    )
    rows = [
        label(setting)
        | {"form": name, "s": statistics.median(taken[name]), "over lora": ratio(taken, name, "lora")}
        | ({"MiB": memory_on_cpu(setting, method)} if setting.device == "cpu" else {})
        for name, method in methods.items()
    ]
    report("evidence", "training step of the forms of docs/evidence", rows, setting.device)


if __name__ == "__main__":
    main()
