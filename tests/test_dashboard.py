"""The command that builds a workspace: in a dry run, with a server that stands in for W&B, and mistakes."""

import json
import os
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import Commands
from dashboards import workspace
from processes import CONTEXT

from convlora import dashboard

SECTIONS = ["Overview", "Training", "Validation", "Per data set and class", "Qualitative", "Routing", "Sweep",
            "System"]  # fmt: skip


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a login"))


@pytest.mark.usefixtures("nobody")
def test_a_dry_run_writes_a_workspace_without_a_login(cli: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    given = ("project=polyps", "entity=us", "name=all runs", "output=made/here.json")
    done = cli(dashboard, *given, "dry_run=true")
    assert (done.code, done.out) == (0, "workspace of 8 sections: made/here.json\n")
    view = json.loads(Path("made/here.json").read_text())
    assert [view[key] for key in ("entity", "project", "displayName")] == ["us", "polyps", "all runs"]
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == SECTIONS
    assert all(section["panels"] for section in sections)


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("project=polyps",), "this machine is not logged in to W&B; run `wandb login`, or write "),
        ((), "project must be given; write project=VALUE"),
        (("project=polyps", "nmae=all"), "unknown key 'nmae'; did you mean 'name'?"),
        (("project=polyps", "dry_run=true", "output=file/a.json"), "output=file cannot be made a folder"),
    ],
)
def test_a_mistake_is_told_with_a_way_out(
    cli: Commands, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    Path("file").touch()
    done = cli(dashboard, *arguments)
    assert done.code == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1


class Server(ThreadingHTTPServer):
    """What W&B's server answers, as far as it is asked here; it keeps what it is told."""

    view: dict[str, Any] | None = None


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = json.loads(body) if self.path.endswith("/graphql") and body else {"query": ""}
        answer: dict[str, Any] = {"data": {"viewer": {"id": "1", "entity": "us", "teams": {"edges": []}}}}
        if "upsertView" in asked["query"]:
            self.server.view = asked["variables"]
            answer = {"data": {"upsertView": {"view": {"id": "1", "name": "nw-new-v"}, "inserted": True}}}
            if asked["variables"]["projectName"] == "nowhere":
                answer = {"data": None, "errors": [{"message": "project not found"}]}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def save(project: str, port: int, out: Path) -> None:
    os.environ.pop("WANDB_MODE", None)
    os.environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="a" * 40)
    stream = os.open(out, os.O_CREAT | os.O_WRONLY)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = ["convlora.dashboard", f"project={project}", "name=all"]
    dashboard.main()


@pytest.mark.parametrize("project", ["convlora", "nowhere"])
def test_wandb_is_told_what_a_dry_run_writes(tmp_path: Path, server: Server, project: str) -> None:
    process = CONTEXT.Process(target=save, args=(project, server.server_port, tmp_path / "out"))
    process.start()
    process.join(120)
    said = (tmp_path / "out").read_text()
    assert server.view is not None, said
    if project == "nowhere":
        assert process.exitcode == 1
        assert said.startswith("error: W&B did not take the workspace (")
        assert "project not found" in said
        assert len(said.splitlines()) == 1
        return
    assert (process.exitcode, said) == (0, f"http://127.0.0.1:{server.server_port}/us/convlora?nw=new\n")
    assert (server.view["entityName"], server.view["displayName"]) == ("us", "all")
    assert plain(json.loads(server.view["spec"])) == plain(workspace(tmp_path)["spec"])


def plain(spec: Any) -> Any:
    """A workspace less the identity that each panel is given anew."""
    if isinstance(spec, dict):
        return {key: plain(value) for key, value in spec.items() if key not in ("__id__", "id")}
    return [plain(each) for each in spec] if isinstance(spec, list) else spec
