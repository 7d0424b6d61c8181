"""What runs told W&B, read back from the files that it keeps."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Dashboard:
    """One run of W&B, in all the parts in which it was logged."""

    run_id: str
    name: str
    group: str
    tags: list[str]
    names: set[str] = field(default_factory=set)
    summary: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)


def dashboards(folder: Path) -> list[Dashboard]:
    """The runs that were logged at or below a folder."""
    found: dict[str, Dashboard] = {}
    for path in sorted(folder.rglob("offline-run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        run = next(record["run"] for record in records if record["type"] == "run")
        given = (run["run_id"], run["display_name"], run["run_group"], run["tags"])
        dashboard = found.setdefault(run["run_id"], Dashboard(*given))
        for record in records:
            if record["type"] == "history":
                item = record["history"]["item"]
                dashboard.names |= {key.removesuffix("._type") for key in item}
                dashboard.steps += [item["trainer/global_step"]] if "trainer/global_step" in item else []
            elif record["type"] == "summary":
                dashboard.summary |= record["summary"].get("update", {})
    return list(found.values())
