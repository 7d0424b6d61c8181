"""Compare ended runs: `python -m convlora.report runs=multirun/... baseline=lora`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from convlora import comparison, page, results, run
from convlora.cli import command
from convlora.results import Run


@dataclass(frozen=True)
class ReportConfig:
    """The keys of conf/report.yaml, where they are explained."""

    runs: str | list[str]
    output: str | None
    baseline: str | None
    score: str | None


def report(config: ReportConfig) -> None:
    """Write report.csv, report.md and report.html.

    Raises:
        OSError: a folder does not exist, or the output cannot be made.
        ValueError: no run has ended, no setting or several are the baseline, or there is no such score.
    """
    folders = [Path(folder) for folder in ([config.runs] if isinstance(config.runs, str) else config.runs)]
    found, evaluations = gather(folders)
    sections = comparison.compare(found, config.score, config.baseline)
    output = folders[0] if config.output is None else Path(config.output)
    run.make_folder("output", output)
    comparison.write_csv(sections, output / "report.csv")
    (output / "report.md").write_text(comparison.markdown(sections), encoding="utf-8")
    (output / "report.html").write_text(page.render(sections), encoding="utf-8")
    count = sum(len(setting.runs) for section in sections for setting in section.settings)
    console = Console(highlight=False, soft_wrap=True)
    if evaluations:
        console.print(
            f"left out, since they evaluate adapters and are no runs: {', '.join(map(str, evaluations))}",
            markup=False,
        )
    console.print(
        f"{count} run{'s' * (count != 1)}: {output / 'report.html'}, report.md, report.csv", markup=False
    )


def gather(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Return the ended runs at or below folders, each once, and the folders of evaluations of adapters.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: there is none, or none has an ended run.
    """
    if not folders:
        raise ValueError("runs=[] names no folder; name one or several that hold ended runs")
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"runs={folder}: no such folder; name one or several that hold runs")
    runs = {found.folder.resolve(): found for folder in folders for found in results.find(folder)}
    evaluations = {path.resolve(): path for folder in folders for path in results.find_evaluations(folder)}
    if not runs:
        names = ", ".join(map(str, folders))
        if evaluations and not any(True for folder in folders for _ in folder.rglob(run.RECORD)):
            raise ValueError(
                f"runs=[{names}]: evaluations of adapters ({run.SCORES}) but no runs, which a report "
                "compares; name the folders of the trainings, which hold test scores too"
            )
        raise ValueError(
            f"runs=[{names}]: no run there has ended (none has a {run.SUMMARY}); name folders that hold "
            "ended runs, or go on with one by python -m convlora.train resume=RUN"
        )
    return list(runs.values()), list(evaluations.values())


main = command("report", ReportConfig, report)

if __name__ == "__main__":
    main()
