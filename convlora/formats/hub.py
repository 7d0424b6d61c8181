"""An adapter as a folder that is ready for the Hugging Face Hub: the file, its config, a model card."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from convlora import adapter as file
from convlora import run
from convlora.adapter import Adapter
from convlora.formats.graph import method_of

CONFIG, CARD = "config.json", "README.md"
REPO = "USER/REPO"  # in what a user is to fill in
TASK = "image-segmentation"
PROTOCOL = "at each image's own size, on 8-bit probabilities"
PLACES = ("data_root", "run_dir", "resume", "dataset.root", "dataset.source", "loading.cache")
BASES = {  # of the models in conf/model/ that the hub has
    "sam_vit_b": "facebook/sam-vit-base",
    "sam_vit_l": "facebook/sam-vit-large",
    "sam_vit_h": "facebook/sam-vit-huge",
    "mobile_sam": "dhkim2810/MobileSAM",
}


@dataclass(frozen=True)
class Scored:
    """What a run scored on a test set.

    Attributes:
        dataset: its name.
        images: how many; None where no table tells.
        scores: by name, those that are numbers.
    """

    dataset: str
    images: int | None
    scores: dict[str, float]


def write(adapter: Adapter, folder: Path, source: Path | None, license_name: str) -> str:
    """Write the folder and return what it says of the scores.

    Paths are left out, since they name places on this machine: whoever loads the adapter
    takes the official weights, or names others, whose SHA-256 must be that of the training.

    Args:
        adapter: what is exported.
        folder: to write to.
        source: folder of the run that ended with the adapter; None where there is none.
        license_name: of the adapter, as the hub abbreviates it.
    """
    config = json.loads(adapter.metadata["config"])
    local = config["model"].get("weights")
    forget_places(config)
    metadata = {**adapter.metadata, "config": json.dumps(config)}
    file.save(folder / file.NAME, adapter.segmenter.trainable_state(), metadata)
    readable = {key: _read(value) for key, value in metadata.items()}
    (folder / CONFIG).write_text(json.dumps(readable, indent=2) + "\n")
    scored = [] if source is None else read_scores(source)
    card = ModelCard(
        f"---\n{card_data(adapter, scored, license_name).to_yaml()}\n---\n\n{text(adapter, scored, local)}"
    )
    (folder / CARD).write_text(str(card), encoding="utf-8")
    ModelCard.load(folder / CARD)  # as the hub reads it
    if not scored:
        return "no scores, since the run has no summary.json"
    return f"scores on {', '.join(each.dataset for each in scored)}"


def forget_places(config: dict[str, Any]) -> None:
    """Take out of the settings of a training what names a place on its machine."""
    config["model"]["weights"] = None
    for key in PLACES:
        section, _, name = key.rpartition(".")
        config.get(section, {}).pop(name, None) if section else config.pop(name, None)


def _read(value: str) -> Any:
    """Return what a text of the metadata holds: a structure or a number where it is one."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def read_scores(folder: Path) -> list[Scored]:
    """Return what a run that has ended scored, the data set that it was trained on first."""
    summary = json.loads((folder / run.SUMMARY).read_text())
    tests = {summary["dataset"]: summary["test"], **summary["test_sets"]}
    return [
        Scored(
            name,
            count_images(folder if number == 0 else folder / name),
            {key: value for key, value in scores.items() if value is not None and math.isfinite(value)},
        )
        for number, (name, scores) in enumerate(tests.items())
    ]


def count_images(folder: Path) -> int | None:
    """Return how many images a table of scores has; None where there is no table."""
    path = folder / "images.csv"
    if not path.is_file():
        return None
    with path.open(newline="") as table:
        return sum(1 for _ in csv.DictReader(table))


def card_data(adapter: Adapter, scored: list[Scored], license_name: str) -> ModelCardData:
    """Return the front matter of the model card."""
    base, method = adapter.metadata["base"], method_of(adapter)
    relation = {"base_model_relation": "adapter"} if base in BASES else {}
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=each.dataset,
            dataset_name=each.dataset,
            dataset_split="test",
            dataset_args=None if each.images is None else {"num_images": each.images},
            metric_type=key,
            metric_name=key,
            metric_value=round(value, 4),
            metric_args={"protocol": PROTOCOL},
        )
        for each in scored
        for key, value in each.scores.items()
        if key != "loss"
    ]
    metrics = list(dict.fromkeys(result.metric_type for result in results))
    return ModelCardData(
        license=license_name,
        library_name="convlora",
        pipeline_tag=TASK,
        datasets=[each.dataset for each in scored if each.dataset != "folder"] or None,
        metrics=metrics or None,
        tags=["segment-anything", "sam", base, method.lower(), TASK],
        model_name=title(adapter) if results else None,
        eval_results=results or None,
        base_model=BASES.get(base),
        **relation,  # type: ignore[arg-type]  # one of the keys that have no argument of their own
    )


def title(adapter: Adapter) -> str:
    """Return what the model is called."""
    return f"{', '.join(adapter.class_colors)}: {adapter.metadata['base']} with {method_of(adapter)}"


def text(adapter: Adapter, scored: list[Scored], local: str | None) -> str:
    """Return the body of the model card."""
    size, trained = adapter.resize.image_size, adapter.segmenter.trainable_state()
    count = sum(tensor.numel() for tensor in trained.values())
    own = "" if local is None else f', weights="{Path(local).name}"'
    hint = (
        ""
        if local is None
        else f"\n`weights` names the base weights, of SHA-256 `{adapter.metadata['base_sha256']}`;\n"
        "without it the official ones are taken, which must be the same.\n"
    )
    tables = "\n".join(_table(each) for each in scored)
    measured = f"\n## Scores\n\nOn the test images, {PROTOCOL}.\n{tables}" if scored else ""
    return f"""# {title(adapter)}

An automatic segmenter, which takes images and no prompts: a frozen Segment Anything Model
({adapter.metadata["base"]}) with {count:,} trained parameters, by convlora.

| | |
|---|---|
| classes | {", ".join(adapter.class_colors)} |
| input | images of any size, brought to {size} x {size} pixels by {type(adapter.resize).__name__} |
| image files | {"8-bit RGB" if adapter.bands is None else f"bands {adapter.bands}"} |
| method | {method_of(adapter)} |
| precision of the training | {adapter.metadata["precision"]} |

## Use

```python
from convlora.adapter import load

predictor = load("{REPO}"{own})
found = predictor.predict("{"photo.jpg" if adapter.bands is None else "scene.tif"}")
found.classes  # ids [h, w] at the image's own size
found.prob     # their probability [h, w], 0 to 255
```
{hint}
All settings: `{CONFIG}`.
{measured}"""


def _table(scored: Scored) -> str:
    images = "" if scored.images is None else f", {scored.images} images"
    rows = "".join(f"| {key} | {value:.4f} |\n" for key, value in scored.scores.items() if key != "loss")
    return f"\n{scored.dataset}{images}:\n\n| score | |\n|---|---|\n{rows}"
