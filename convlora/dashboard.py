"""Build a W&B workspace: `python -m convlora.dashboard project=convlora`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import wandb
from rich.console import Console
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from convlora import run
from convlora.cli import command
from convlora.tracking import login

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


@dataclass(frozen=True)
class DashboardConfig:
    """The keys of conf/dashboard.yaml, where they are explained."""

    project: str
    entity: str | None
    name: str
    output: str
    dry_run: bool


def dashboard(config: DashboardConfig) -> None:
    """Save a workspace in W&B, or with `dry_run` write its JSON to a file.

    Raises:
        OSError: the file cannot be made, or W&B cannot be reached or refuses.
        ValueError: the machine is not logged in to W&B, or the package wandb-workspaces is missing.
    """
    say = Console(highlight=False, soft_wrap=True).print
    if config.dry_run:
        output, made = Path(config.output), build(config, config.entity or "")
        run.make_folder("output", output.parent)
        view = made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        output.write_text(json.dumps(view, indent=2) + "\n")
        say(f"workspace of {len(made.sections)} sections: {output}", markup=False)
        return
    try:
        if not login():
            raise ValueError(
                "this machine is not logged in to W&B; run `wandb login`, or write the workspace to a file "
                "by dry_run=true"
            )
        url = build(config, config.entity or wandb.Api().default_entity or "").save().url  # type: ignore[no-untyped-call]
    except (wandb.Error, WandbApiFailedError) as error:
        raise OSError(
            f"W&B did not take the workspace ({str(error).strip()}); look at entity=, project= and the "
            "network, or write it to a file by dry_run=true"
        ) from error
    say(url, markup=False)


def build(config: DashboardConfig, entity: str) -> "Workspace":
    """Return the workspace; raises ValueError where wandb-workspaces is missing."""
    try:
        from convlora import panels
    except ModuleNotFoundError as error:
        raise ValueError(
            "the package wandb-workspaces is missing; install it by pip install 'convlora[dashboard]'"
        ) from error
    return panels.workspace(entity, config.project, config.name)


main = command("dashboard", DashboardConfig, dashboard)

if __name__ == "__main__":
    main()
