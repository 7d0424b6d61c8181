"""Bring a run into the form that others take: `python -m convlora.export checkpoint=RUN format=onnx`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from convlora import adapter, run
from convlora.adapter import Adapter
from convlora.checkpoint import next_epoch, read_checkpoint
from convlora.cli import command, refuse_idle
from convlora.data.images import list_images
from convlora.formats import hub, onnx, program, sam
from convlora.formats.folder import new_folder
from convlora.formats.graph import make_trial
from convlora.schema import Config, suggest

FORMATS = ("adapter", "onnx", "torch", "sam", "hub")
COMPARED = ("onnx", "torch")  # with PyTorch, on images


@dataclass(frozen=True)
class ExportConfig:
    """The keys of conf/export.yaml, where they are explained."""

    checkpoint: str
    format: str
    output: str | None
    images: str | None
    license: str
    model: Config


def export(config: ExportConfig) -> None:
    """Write one form of a run's adapter, or of its best epoch so far.

    Raises:
        FileNotFoundError: there is no adapter, and the run has saved no epoch.
        OSError: the output cannot be written.
        ValueError: no such format, or it cannot hold what was learnt.
    """
    if config.format not in FORMATS:
        raise ValueError(
            f"format={config.format}: there is none of that name; {suggest(config.format, FORMATS)}"
        )
    refuse_idle("model")
    if config.images is not None and config.format not in COMPARED:
        raise ValueError(f"images={config.images} has no effect on format={config.format}; leave it out")
    console = Console(highlight=False, soft_wrap=True)
    if config.format == "adapter":
        console.print(save_adapter(config))
        return
    if config.format == "onnx":
        onnx.check_packages()
    folder = None if config.images is None else Path(config.images)
    if folder is not None:
        list_images(folder)  # a folder that is missing should not come out after the rest
    output = make_output(config)
    with new_folder(output) as new:
        console.print(f"{config.format}: {output} ...")
        trained, epoch = read_trained(config)
        said = write(config, trained, new, folder)
    console.print(f"{epoch}{said}\nREADME.md and all that belongs to it: {output}")
    if config.format == "hub":
        console.print(f"to upload it: hf upload {hub.REPO} {output}")


def write(config: ExportConfig, trained: Adapter, new: Path, images: Path | None) -> str:
    """Write the chosen form into a new folder and return what is to be said of it."""
    if config.format == "sam":
        return sam.write(trained, new, config.model["weights"])
    if config.format == "hub":
        run_folder = Path(config.checkpoint)
        ended = (run_folder / run.SUMMARY).is_file()
        return hub.write(trained, new, run_folder if ended else None, config.license)
    trial = make_trial(trained, images)
    return onnx.write(trained, new, trial) if config.format == "onnx" else program.write(trained, new, trial)


def make_output(config: ExportConfig) -> Path:
    """Return the folder to write: by default one in the run's folder, called as the format.

    Raises:
        ValueError: the adapter lies on the hub, and no folder was named.
    """
    if config.output is not None:
        return Path(config.output)
    path = Path(config.checkpoint)
    if path.is_dir():
        return path / config.format
    if path.is_file():
        return path.parent / config.format
    adapter.find(path)  # tells what is wrong with a path at which nothing lies
    raise ValueError(f"checkpoint={path} lies on the hub; say where to write, output=FOLDER")


def read_trained(config: ExportConfig) -> tuple[Adapter, str]:
    """Return the adapter, and a line on its epoch where the run has not ended and that is the best so far."""
    folder, weights = Path(config.checkpoint), config.model["weights"]
    stopped = (folder / run.BEST).is_file() and not (folder / run.SUMMARY).is_file()
    if not stopped:
        return adapter.read(config.checkpoint, weights, "32-true"), ""
    checkpoint = read_checkpoint(folder / run.BEST)
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / adapter.NAME
        adapter.save(path, checkpoint["state_dict"], checkpoint["metadata"])
        trained = adapter.read(path, weights, "32-true")
    return trained, f"epoch {next_epoch(checkpoint)}, the best so far of a run that has not ended\n"


def save_adapter(config: ExportConfig) -> str:
    """Write the adapter of a run's best epoch so far, and return what was written."""
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
    return f"adapter of epoch {next_epoch(checkpoint)}: {output}"


main = command("export", ExportConfig, export)

if __name__ == "__main__":
    main()
