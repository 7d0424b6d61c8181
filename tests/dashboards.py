"""What runs told W&B, read back from the files that it keeps, and what a workspace shows of it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convlora.dashboard import DashboardConfig, dashboard


@dataclass
class Dashboard:
    """One run of W&B, in all the parts in which it was logged.

    Attributes:
        kinds: by name, what was logged over the steps: `number`, or W&B's word for a picture or a table.
        tables: by name, the rows of the last one; of a picture there is no more than the word.
        settings: by key, as it was logged.
        system: names of what W&B measured of the machine.
        steps: of the optimiser, in each part.
    """

    run_id: str
    name: str
    group: str
    job_type: str
    tags: list[str]
    kinds: dict[str, str] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    system: set[str] = field(default_factory=set)
    steps: list[list[int]] = field(default_factory=list)


def dashboards(folder: Path) -> list[Dashboard]:
    """The runs that were logged at or below a folder."""
    found: dict[str, Dashboard] = {}
    for path in sorted(folder.rglob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        run = next(record["run"] for record in records if record["type"] == "run")
        given = (run["run_id"], run["display_name"], run["run_group"], run["job_type"], run["tags"])
        dashboard = found.setdefault(run["run_id"], Dashboard(*given))
        dashboard.steps.append([])
        for record in records:
            content = record.get(record["type"])
            if record["type"] == "history":
                item = content["item"]
                dashboard.steps[-1] += [item["trainer/global_step"]] if "trainer/global_step" in item else []
                kinds = {key.removesuffix("._type"): item[key] for key in item if key.endswith("._type")}
                plain = [key for key in item if not key.startswith(tuple(f"{name}." for name in kinds))]
                dashboard.kinds |= dict.fromkeys(plain, "number") | kinds
                for name in [name for name, kind in kinds.items() if kind == "table-file"]:
                    table = json.loads((path.parent / "files" / item[f"{name}.path"]).read_text())
                    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
                    dashboard.tables[name] = rows
            elif record["type"] == "summary":
                dashboard.summary |= content.get("update", {})
            elif record["type"] == "config":
                dashboard.settings |= content.get("update", {})
            elif record["type"] == "stats":
                dashboard.system |= content["item"].keys()
    return list(found.values())


# What no panel shows as such: axes, and what a run has under the name of its test set too
AXES = r"epoch|trainer/global_step|_\w+(\.\w+)*"
AGAIN = r"test/[^/]+"
# What W&B measures later than a short run lasts, or where there is a GPU
LATER = r"cpu|gpu\..*"


def workspace(folder: Path) -> dict[str, Any]:
    """What the command writes in a dry run."""
    dashboard(DashboardConfig("convlora", None, "all", str(folder / "dashboard.json"), dry_run=True))
    view: dict[str, Any] = json.loads((folder / "dashboard.json").read_text())
    return view


def asked(view: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the panels of a workspace and its table of runs show: kind and name."""
    section = view["spec"]["section"]
    for name in section["runSets"][0]["runFeed"]["columnOrder"]:
        yield tuple(name.split(":", 1))  # type: ignore[misc]
    for panel in [panel for each in section["panelBankConfig"]["sections"] for panel in each["panels"]]:
        config = panel["config"]
        names = [
            name
            for name in config.get("metrics", [])
            if panel["viewType"] in ("Run History Line Plot", "Bar Chart")
        ]
        for name in names:
            kind, _, rest = name.partition("/")
            yield ("system", rest) if kind == "system" else ("number", name)
        yield from (("pattern", config[key]) for key in ("metricRegex",) if key in config)
        yield from (("picture", name) for name in config.get("mediaKeys", []))
        yield from (("summary", config[key]) for key in ("targetKey",) if key in config)
        accessors = [
            config[key]
            for key in ("xAxis", "yAxis", "zAxis")
            if panel["viewType"] == "Scatter Plot" and key in config
        ]
        for accessor in accessors + [column["accessor"] for column in config.get("columns", [])]:
            yield tuple(accessor.split(":", 1))  # type: ignore[misc]
        if panel["viewType"] == "Weave":
            yield (
                "table",
                re.search(
                    r'"key": {"nodeType": "const", "type": "string", "val": "([^"]+)"', json.dumps(panel)
                )[1],
            )  # type: ignore[index]


def missing(view: dict[str, Any], run: Dashboard) -> set[str]:
    """What a workspace shows and a run does not have."""
    numbers = [name for name, kind in run.kinds.items() if kind == "number"]
    pictures = [name for name, kind in run.kinds.items() if kind in ("images/separated", "histogram")]

    def there(kind: str, name: str) -> bool:
        if kind == "pattern":
            return any(re.search(name, number) for number in numbers)
        if kind == "config":
            return name.removesuffix(".value") in run.settings and name.endswith(".value")
        if kind == "run":
            return name in ("displayName", "state")
        if kind == "system" and re.fullmatch(LATER, name):
            return True
        places = {"number": numbers, "picture": pictures, "table": run.tables}
        return name in (places | {"summary": run.summary, "system": run.system})[kind]

    return {name for kind, name in asked(view) if not there(kind, name)}


def unshown(view: dict[str, Any], run: Dashboard) -> set[str]:
    """What a run has and no panel of a workspace shows."""
    shown = set(asked(view))
    patterns = [name for kind, name in shown if kind == "pattern"]
    names = {name for kind, name in shown if kind != "pattern"}
    media = [name for name, kind in run.kinds.items() if kind != "number"]
    sums = [
        name
        for name, value in run.summary.items()
        if isinstance(value, int | float) and not name.startswith(tuple(f"{each}." for each in media))
    ]
    return {
        name
        for name in {*run.kinds, *sums} - names
        if not re.fullmatch(f"{AXES}|{AGAIN}" if name not in media else AXES, name)
        and (name in media or not any(re.search(pattern, name) for pattern in patterns))
    }
