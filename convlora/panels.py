"""What a W&B workspace shows of the runs of a project, section by section.

Runs on any data sets, with any scores and classes, share the panels: what differs in name is chosen by a
regular expression, what every run has goes by one name, as `score/test`.
"""

import re
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

GPUS = 8  # of one machine, as far as they are shown
TEST = "^test/[^/]+/"  # before the name of a score, on any data set
SCORE = wr.SummaryMetric("score/val")
COLUMNS = (
    "run:state",
    "summary:dataset",
    "summary:score/val",
    "summary:score/test",
    "summary:trainable_parameters",
    "summary:total_parameters",
    "summary:epochs",
    "summary:steps",
    "summary:fit_seconds",
)
"""Of the table of runs."""


class _Setting(wr.ParallelCoordinatesPlotColumn):
    """A column of a setting, by its key."""

    def __init__(self, key: str):
        super().__init__(metric=wr.Config(key))

    def _to_model(self) -> Any:
        model = super()._to_model()  # type: ignore[no-untyped-call]
        model.accessor = _flat(model.accessor)
        return model


class _Heatmap(wr.ScatterPlot):
    """A score by two settings."""

    def _to_model(self) -> Any:
        model = super()._to_model()  # type: ignore[no-untyped-call]
        model.config.x_axis, model.config.y_axis = map(_flat, (model.config.x_axis, model.config.y_axis))
        return model


def _flat(accessor: str) -> str:
    """Return how W&B calls a setting that was logged as `peft.rank`, and not as `rank` in `peft`."""
    return re.sub(r"^config:(\w+)\.value\.(.+)", r"config:\1.\2.value", accessor)


def workspace(entity: str, project: str, name: str) -> ws.Workspace:
    """Return the workspace of a project's runs.

    Args:
        entity: user or team of W&B's.
        project: of W&B's.
        name: of the workspace.
    """
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(
                name="Overview",
                is_open=True,
                panels=[
                    wr.BarPlot(
                        title="Test score of each group, mean over its runs",
                        metrics=["score/test"],
                        groupby="Group",
                        groupby_aggfunc="mean",
                        groupby_rangefunc="stderr",
                    ),
                    wr.BarPlot(title="Test score of each run", metrics=["score/test"]),
                    _lines("Losses", "train/loss", "val/loss"),
                    _cost("Test score against trained parameters", "trainable_parameters"),
                    _cost("Test score against seconds of training", "fit_seconds"),
                    wr.RunComparer(diff_only="split"),
                ],
            ),
            ws.Section(
                name="Training",
                panels=[
                    _lines("Loss", "train/loss"),
                    _lines("Auxiliary loss, balance of experts", "train/aux_loss"),
                    _lines("Learning rate", "train/lr"),
                    _lines("Norm of the gradient", "train/grad_norm", log_y=True),
                    _pictures("Curves", "test/curves", columns=1),
                ],
            ),
            ws.Section(
                name="Validation",
                panels=[_lines("Loss", "val/loss"), _lines("All scores", regex="^val/")],
            ),
            ws.Section(
                name="Per data set and class",
                panels=[
                    _lines("Overlap", regex=f"{TEST}(dice|iou|miou|.*jaccard)(_pooled)?$"),
                    _lines("Structure", regex=f"{TEST}.*measure"),
                    _lines("Errors", regex=f"{TEST}(mae|ber|hd95|ece|loss)$"),
                    _lines("IoU of each class, or pooled", regex=f"{TEST}iou_"),
                    _lines("IoU of each class in validation", regex="^val/iou_"),
                    _lines("All scores", regex=TEST),
                    _pictures("Reliability", "test/reliability"),
                    _pictures("Confusion", "test/confusion"),
                    *map(_table, ("scores", "reliability", "confusion")),
                ],
            ),
            ws.Section(
                name="Qualitative",
                panels=[
                    _pictures("Test images: samples, the best and the worst", "test/overlays", columns=1),
                    _pictures("Validation images over the steps", "val/overlays"),
                    _table("images"),
                ],
            ),
            ws.Section(
                name="Routing",
                panels=[
                    _lines("Entropy of each layer's experts, bits", regex="^routing/"),
                    _pictures("Share of each expert, by layer", "train/routing"),
                    _pictures("Share of each expert, over all layers", "train/experts"),
                    _pictures("Test images", "test/routing", columns=1),
                    *map(_table, ("routing", "routing_images")),
                ],
            ),
            ws.Section(
                name="Sweep",
                panels=[
                    wr.ParallelCoordinatesPlot(
                        title="Settings and score in validation",
                        columns=[
                            *map(_Setting, ("peft.rank", "peft.num_experts", "optimizer.lr", "seed")),
                            wr.ParallelCoordinatesPlotColumn(metric=SCORE),
                        ],
                    ),
                    wr.ParameterImportancePlot(with_respect_to=SCORE.name),
                    _Heatmap(  # W&B has none; a colour for each pair comes nearest
                        title="Score in validation by rank and number of experts",
                        x=wr.Config("peft.rank"),
                        y=wr.Config("peft.num_experts"),
                        z=SCORE,
                        gradient=[
                            wr.GradientPoint(color="#440154", offset=0),
                            wr.GradientPoint(color="#21918c", offset=50),
                            wr.GradientPoint(color="#fde725", offset=100),
                        ],
                    ),
                ],
            ),
            ws.Section(
                name="System",
                panels=[
                    _lines("Images a second in training", "train/images_per_second"),
                    _lines("Peak memory, MiB: of the GPU, or of the process", "train/memory_mib"),
                    _system("CPU, %", "cpu"),
                    _system("Memory of the process, MB", "proc.memory.rssMB"),
                    _system("GPU, %", *(f"gpu.{number}.gpu" for number in range(GPUS))),
                    _system(
                        "Memory of the GPU, %", *(f"gpu.{number}.memoryAllocated" for number in range(GPUS))
                    ),
                ],
            ),
        ],
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step", max_runs=50),
        runset_settings=ws.RunsetSettings(pinned_columns=["run:displayName", *COLUMNS]),
    )


def _lines(title: str, *keys: str, regex: str | None = None, **options: Any) -> wr.LinePlot:
    """Return curves over the steps; of what a run has one value of, W&B makes bars."""
    return wr.LinePlot(title=title, x="trainer/global_step", y=[*keys], metric_regex=regex, **options)


def _system(title: str, *keys: str) -> wr.LinePlot:
    """Return curves of what W&B measures of the machine over the seconds since the start."""
    return wr.LinePlot(title=title, x="RelativeTime(Process)", y=[f"system/{key}" for key in keys])


def _cost(title: str, key: str) -> wr.ScatterPlot:
    x, y = wr.SummaryMetric(key), wr.SummaryMetric("score/test")
    return wr.ScatterPlot(title=title, x=x, y=y, log_x=True)


def _pictures(title: str, key: str, columns: int = 2) -> wr.MediaBrowser:
    return wr.MediaBrowser(title=title, media_keys=[key], num_columns=columns)


def _table(name: str) -> wr.WeavePanelSummaryTable:
    return wr.WeavePanelSummaryTable(table_name=f"test/{name}_table")
