"""Adapters from the Hugging Face Hub, which a local server stands in for."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from convlora import adapter
from convlora.adapter import NAME, find

CONTENT = {"main": b"the newest", "v1": b"an earlier one"}
ADDRESS = "/{repo_id}/resolve/{revision}/{filename}"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """Has user/repo with an adapter in two revisions, and user/empty without one."""

    def answer(self, *, body: bool) -> None:
        _, user, name, _, revision, file = [*self.path.split("/"), "", "", ""][:6]
        error = ""
        if (user, name) not in (("user", "repo"), ("user", "empty")):
            error = "RepoNotFound"
        elif revision not in CONTENT:
            error = "RevisionNotFound"
        elif name == "empty" or file != NAME:
            error = "EntryNotFound"
        self.send_response(404 if error else 200)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = CONTENT[revision]
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("X-Repo-Commit", COMMITS[revision])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.daemon_threads = True
        # read from the environment when the package is imported
        origin = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", origin + ADDRESS)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("name", "revision"), [("user/repo", "main"), ("user/repo@v1", "v1")])
def test_a_repository_gives_the_adapter_of_its_revision(name: str, revision: str) -> None:
    assert find(name).read_bytes() == CONTENT[revision]


@pytest.mark.usefixtures("hub")
def test_a_path_that_is_there_goes_before_the_hub() -> None:
    Path("user").mkdir()
    Path("user/repo").write_bytes(b"mine")
    assert find("user/repo") == Path("user/repo")


@pytest.mark.usefixtures("hub")
def test_in_a_folder_that_is_there_only_files_are_looked_for() -> None:
    Path("user").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no adapter at user/repo; a training run leaves one"):
        find("user/repo")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/none", r"no user/none here, and the hub has no such repository, or it is private"),
        ("user/empty", r"user/empty on the hub has no adapter.safetensors"),
        ("user/repo@v9", r"user/repo on the hub has no revision v9"),
        ("a--b/c", r"no a--b/c here, and the hub has no such repository"),
        ("runs/a/b", r"no adapter at runs/a/b; a training run leaves one"),
        ("runs/a.safetensors", r"no adapter at runs/a.safetensors; a training run leaves one"),
        ("./user/repo", r"no adapter at user/repo; a training run leaves one"),
        ("user/", r"no adapter at user; a training run leaves one"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message) as caught:
        find(name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.usefixtures("hub")
def test_without_a_network_the_cache_serves_what_was_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    find("user/repo")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find("user/repo").read_bytes() == CONTENT["main"]
    with pytest.raises(OSError, match=r"no user/other here nor in the hub's cache.*HF_HUB_OFFLINE is set"):
        find("user/other")


def test_a_hub_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:9{ADDRESS}"
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its tries
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match=r"no user/repo here nor in the hub's cache") as caught:
        find("user/repo")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.usefixtures("hub")
def test_what_the_hub_gives_is_read_as_any_adapter() -> None:
    with pytest.raises(ValueError, match=r"is no adapter file or is damaged"):
        adapter.read("user/repo")
