"""Make a file of a run: `python -m convlora.export checkpoint=RUN`."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from convlora import adapter, run
from convlora.checkpoint import next_epoch, read_checkpoint
from convlora.cli import command


@dataclass(frozen=True)
class ExportConfig:
    """The keys of conf/export.yaml, where they are explained."""

    checkpoint: str
    format: str
    output: str | None


def export(config: ExportConfig) -> None:
    """Write the adapter of a run's best epoch so far.

    Raises:
        FileNotFoundError: the run has saved no epoch.
        ValueError: no such format.
    """
    if config.format != "adapter":
        raise ValueError(f"format={config.format} must be adapter")
    folder = Path(config.checkpoint)
    if folder.is_file():
        raise ValueError(f"checkpoint={folder} is a file; name the folder of a run, which has a {run.BEST}")
    best = folder / run.BEST
    if not best.is_file():
        raise FileNotFoundError(
            f"checkpoint={folder}: no {best}; name the folder of a run that has ended an epoch"
        )
    checkpoint = read_checkpoint(best)
    output = folder / adapter.NAME if config.output is None else Path(config.output)
    if output.suffix != ".safetensors":
        raise ValueError(f"output={output} must be a file name that ends in .safetensors")
    adapter.save(output, checkpoint["state_dict"], checkpoint["metadata"])
    epochs = next_epoch(checkpoint)
    Console(highlight=False, soft_wrap=True).print(f"adapter of epoch {epochs}: {output}")


main = command("export", ExportConfig, export)

if __name__ == "__main__":
    main()
