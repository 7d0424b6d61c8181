"""Downloads from a real local server that breaks off, lies, stalls or changes its mind."""

import errno
import hashlib
import io
import logging
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from conftest import ROOT

from convlora import fetch as module
from convlora.fetch import fetch, hash_file, unpack
from convlora.sam import checkpoints

BODY = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
TRIES = len(module.PAUSES) + 1


class Server(ThreadingHTTPServer):
    """Serves `body`; each request is first met by the next of `faults`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.etag: str | None = '"one"'
        self.ranges = True
        self.faults: list[Any] = []
        self.requests: list[dict[str, str]] = []

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that hang up."""

    @property
    def url(self) -> str:
        return f"{self.origin}/sets/toy.zip"

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(dict(self.headers))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        body, start = self.server.body, 0
        wanted = self.headers.get("Range")
        if self.server.ranges and wanted and self.headers.get("If-Range") == self.server.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            wrong = 7 if fault == "wrong part" else 0
            self.send_header("Content-Range", f"bytes {start - wrong}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.end_headers()
        if fault == "truncate":
            self.wfile.write(body[start : start + 300_000])
        elif fault == "stall":
            self.wfile.write(body[start : start + 1_500_000])
            self.wfile.flush()
            time.sleep(2.5)
        elif fault == "trickle":
            for position in range(start, len(body), 100_000):
                self.wfile.write(body[position : position + 100_000])
                self.wfile.flush()
                time.sleep(0.15)
        else:
            self.wfile.write(body[start:])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSES", (0.01,) * 4)
    monkeypatch.setattr(module, "TIMEOUTS", (5.0, 1.5))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@dataclass(frozen=True)
class Door:
    """One of the two ways to the same download: the archive of a data set, or weights."""

    path: Path
    fetch: Callable[[], Path]


@pytest.fixture(params=["archive", "weights"])
def door(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Door:
    """The hash is published: in the data set's YAML, or at the end of the weights' name."""
    if request.param == "archive":
        path = tmp_path / "toy.zip"
        return Door(path, lambda: fetch("toy", server.url, path, SHA256))
    return weights(f"toy_{SHA256[:6]}.pth", request, server, tmp_path)


@pytest.fixture(params=["archive", "weights"])
def unpublished(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Door:
    """Nobody has published a hash."""
    if request.param == "archive":
        path = tmp_path / "toy.zip"
        return Door(path, lambda: fetch("toy", server.url, path))
    return weights("toy.pt", request, server, tmp_path)


def weights(file: str, request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Door:
    request.getfixturevalue("monkeypatch").setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints" / file
    return Door(path, lambda: checkpoints.fetch("toy", f"{server.origin}/{file}"))


def beside(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def test_a_file_arrives_and_its_hash_is_recorded(server: Server, unpublished: Door) -> None:
    path = unpublished.fetch()
    assert path == unpublished.path
    assert path.read_bytes() == BODY
    assert (path.parent / f"{path.name}.sha256").read_text() == f"{SHA256}  {path.name}\n"
    assert beside(path) == [path.name, f"{path.name}.sha256"]


def test_a_published_hash_is_not_recorded(door: Door) -> None:
    assert beside(door.fetch()) == [door.path.name]


def test_what_is_there_is_not_downloaded_again(server: Server, door: Door) -> None:
    for _ in range(3):
        door.fetch()
    assert len(server.requests) == 1


def test_what_was_put_there_by_hand_is_taken_and_nothing_is_written(
    server: Server, unpublished: Door
) -> None:
    unpublished.path.parent.mkdir(parents=True, exist_ok=True)
    unpublished.path.write_bytes(b"by hand")
    assert unpublished.fetch().read_bytes() == b"by hand"
    assert beside(unpublished.path) == [unpublished.path.name]
    assert server.requests == []


@pytest.mark.parametrize("sha256", [SHA256, SHA256[:8], SHA256.upper()])
def test_a_hash_may_be_whole_or_its_first_digits(server: Server, tmp_path: Path, sha256: str) -> None:
    assert fetch("toy", server.url, tmp_path / "toy.zip", sha256).read_bytes() == BODY


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_a_broken_download_goes_on_where_it_stopped(server: Server, door: Door, fault: str) -> None:
    server.faults = [fault, fault]
    assert door.fetch().read_bytes() == BODY
    first, second, third = server.requests
    assert "Range" not in first
    assert 0 < int(second["Range"][6:-1]) < int(third["Range"][6:-1]) < len(BODY)


def test_the_next_run_goes_on_too(server: Server, door: Door) -> None:
    server.faults = ["truncate"] * TRIES
    with pytest.raises(OSError, match=r"toy: could not download http.*run again to go on .* by hand"):
        door.fetch()
    assert len(server.requests) == TRIES
    assert beside(door.path) == [f"{door.path.name}.part", f"{door.path.name}.part.tag"]
    arrived = door.path.with_name(f"{door.path.name}.part").stat().st_size
    assert door.fetch().read_bytes() == BODY
    assert server.requests[-1]["Range"] == f"bytes={arrived}-"
    assert beside(door.path) == [door.path.name]


def test_a_slow_server_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.faults = ["trickle"]
    server.body = BODY[:1_000_000]
    assert fetch("toy", server.url, tmp_path / "toy.zip").read_bytes() == server.body
    assert len(server.requests) == 1


@pytest.mark.parametrize("etag", ['"two"', None, 'W/"one"'])
def test_a_file_that_may_have_changed_starts_anew(server: Server, tmp_path: Path, etag: str | None) -> None:
    """Another tag, none, and a weak one, which does not promise the same bytes."""
    server.faults = ["truncate"] * TRIES
    server.body = BODY[::-1]
    if etag is None or etag.startswith("W/"):
        server.etag = etag
    with pytest.raises(OSError, match="could not download"):
        fetch("toy", server.url, tmp_path / "toy.zip")
    server.body, server.etag = BODY, etag
    assert fetch("toy", server.url, tmp_path / "toy.zip").read_bytes() == BODY


def test_a_server_that_cannot_go_on_starts_anew(server: Server, tmp_path: Path) -> None:
    server.ranges, server.faults = False, ["truncate"]
    assert fetch("toy", server.url, tmp_path / "toy.zip", SHA256).read_bytes() == BODY


def test_a_file_that_has_shrunk_starts_anew(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncate", 416]
    assert fetch("toy", server.url, tmp_path / "toy.zip", SHA256).read_bytes() == BODY
    assert "Range" not in server.requests[-1]


def test_another_part_than_asked_for_starts_anew(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncate", "wrong part"]
    assert fetch("toy", server.url, tmp_path / "toy.zip").read_bytes() == BODY
    assert "Range" in server.requests[1]
    assert "Range" not in server.requests[2]


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, code: int) -> None:
    server.faults = [code, code]
    assert fetch("toy", server.url, tmp_path / "toy.zip").read_bytes() == BODY


@pytest.mark.parametrize("code", [403, 404])
def test_a_file_that_is_not_there_is_asked_for_once(server: Server, door: Door, code: int) -> None:
    server.faults = [code]
    with pytest.raises(
        OSError, match=rf"toy: could not download http.*{code}.*or put the file at .* by hand"
    ):
        door.fetch()
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [404, None])
def test_weights_may_also_be_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server.faults = [fault]
    with pytest.raises((OSError, ValueError), match=r"^toy: .*, or set model\.weights=PATH$"):
        checkpoints.fetch("toy", f"{server.origin}/toy_000000.pth")


def test_no_server_at_all_is_one_clear_error(server: Server, tmp_path: Path) -> None:
    message = r"^toy: could not download http://127\.0\.0\.1:9/a\.zip \(HTTPConnection.*refused\); .*by hand$"
    with pytest.raises(OSError, match=message):
        fetch("toy", "http://127.0.0.1:9/a.zip", tmp_path / "a.zip")


def test_what_is_no_url_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("tried again"))
    with pytest.raises(OSError, match=r"toy: could not download a\.zip \(Invalid URL"):
        fetch("toy", "a.zip", tmp_path / "a.zip")


def test_a_corrupted_file_is_refused_and_downloaded_anew(server: Server, door: Door) -> None:
    server.body = BODY[:-1] + b"x"
    with pytest.raises(
        ValueError, match=rf"toy: the SHA-256 of .* should start with {SHA256[:6]}.*run again"
    ):
        door.fetch()
    assert beside(door.path) == []
    server.body = BODY
    assert door.fetch().read_bytes() == BODY


def test_a_recorded_hash_is_checked_ever_after(server: Server, unpublished: Door) -> None:
    unpublished.fetch().unlink()
    server.body, server.etag = BODY[::-1], '"two"'
    record = unpublished.path.with_name(f"{unpublished.path.name}.sha256")
    message = rf"should start with {SHA256}; run again .*, or delete {record} if its owner changed it"
    with pytest.raises(ValueError, match=message):
        unpublished.fetch()
    record.unlink()
    assert unpublished.fetch().read_bytes() == BODY[::-1]


def test_a_damaged_copy_is_refused_and_kept(server: Server, door: Door) -> None:
    door.fetch().write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=rf"the SHA-256 of {door.path} is .*; delete it to download it again"
    ):
        door.fetch()
    assert door.path.read_bytes() == b"damaged"
    door.path.unlink()
    assert door.fetch().read_bytes() == BODY


def test_a_damaged_copy_is_known_by_the_recorded_hash(server: Server, unpublished: Door) -> None:
    unpublished.fetch().write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"should start with {SHA256}; delete it to download it again"):
        unpublished.fetch()


def test_several_processes_download_once(server: Server, unpublished: Door) -> None:
    server.faults, server.body = ["trickle"], BODY[:400_000]
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(unpublished.fetch) for _ in range(3)]
    assert [each.result().read_bytes() == server.body for each in found] == [True] * 3
    assert len(server.requests) == 1


def test_a_file_is_hashed_again_only_if_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []

    def count(file: Any, kind: str) -> Any:
        hashed.append(file.name)
        return digest(file, kind)

    digest = hashlib.file_digest
    monkeypatch.setattr(module.hashlib, "file_digest", count)
    path = tmp_path / "a"
    path.write_bytes(BODY)
    assert [hash_file(path) for _ in range(3)] == [SHA256] * 3
    assert len(hashed) == 1
    path.write_bytes(b"other")
    assert hash_file(path) == hashlib.sha256(b"other").hexdigest()


def test_nothing_is_drawn_where_there_is_no_terminal(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="convlora.fetch")
    fetch("toy", server.url, tmp_path / "toy.zip")
    assert capsys.readouterr() == ("", "")


def test_too_small_a_disk_is_told_before_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(2**20))
    with pytest.raises(
        OSError, match=r"toy: the disk of .* is full \(3 MiB are needed, 1 MiB are left\); free some"
    ):
        fetch("toy", server.url, tmp_path / "toy.zip")
    assert not any(file.stat().st_size for file in tmp_path.iterdir())


class Usage:
    def __init__(self, free: int):
        self.free = free


class FullDisk(io.BytesIO):
    """A file on a disk that is full after a megabyte."""

    def write(self, chunk: Any) -> int:
        if self.tell() >= 2**20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(chunk)


def test_a_disk_that_fills_up_is_told_and_keeps_what_has_arrived(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        if path.suffix == ".part":
            opened(path, mode).close()
            return FullDisk()
        return opened(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(
            OSError, match=r"toy: the disk of .* is full \(No space.*\); free some and run again"
        ):
            fetch("toy", server.url, tmp_path / "toy.zip")
    assert (tmp_path / "toy.zip.part").is_file()
    assert fetch("toy", server.url, tmp_path / "toy.zip").read_bytes() == BODY


def test_a_killed_download_is_finished_by_the_next_run(server: Server, door: Door, tmp_path: Path) -> None:
    server.faults = ["trickle"]
    sha256 = SHA256 if door.path.suffix == ".zip" else SHA256[:6]
    run = "from pathlib import Path; from convlora.fetch import fetch; "
    process = python(run + f"fetch('toy', {server.url!r}, Path({str(door.path)!r}), {sha256!r})")
    part = door.path.with_name(f"{door.path.name}.part")
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not door.path.exists()
    assert door.fetch().read_bytes() == BODY
    assert server.requests[-1]["Range"].startswith("bytes=")
    assert beside(door.path) == [door.path.name]


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    )


FILES = {"toy/images/1.png": b"one", "toy/masks/1.png": b"two" * 1000, "toy/train.csv": b"image,label\n"}


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes], kind: Any = "gz") -> Path:
    with tarfile.open(path, f"w:{kind}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_archives_unpack_without_what_only_a_mac_needs(make: Any, tmp_path: Path) -> None:
    archive = make(tmp_path / "a", {**FILES, "__MACOSX/toy/._1.png": b"", "toy/.DS_Store": b""})
    unpack("toy", archive, tmp_path / "data/toy")
    assert tree(tmp_path / "data") == FILES


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("name", ["../evil", "toy/../../evil", "/tmp/evil", "..\\evil", "C:\\evil"])
def test_paths_that_lead_outside_are_refused_before_anything_is_written(
    make: Any, name: str, tmp_path: Path
) -> None:
    archive = make(tmp_path / "a", {**FILES, name: b"evil"})
    with pytest.raises(ValueError, match=r"toy: .* was not unpacked, .*evil.* leads outside the folder"):
        unpack("toy", archive, tmp_path / "in/data/toy")
    assert tree(tmp_path) == {"a": archive.read_bytes()}


def test_links_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("toy/link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name, kind in (("toy/link", tarfile.SYMTYPE), ("toy/hard", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    for file in ("a.zip", "b.tar"):
        with pytest.raises(ValueError, match=r"'toy/link' is a link"):
            unpack("toy", tmp_path / file, tmp_path / "data/toy")
    assert not any((tmp_path / "data").iterdir())


@pytest.mark.parametrize("cut", [0, 100, -30])
def test_damaged_archives_are_named(cut: int, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"toy/a": np.random.default_rng(0).bytes(5000)})
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:cut] if cut else bytes(content[:200]) + b"?" * 40 + bytes(content[240:]))
    with pytest.raises(
        ValueError, match=r"toy: .*a\.zip is damaged .*; delete it and run again, or unpack it by hand"
    ):
        unpack("toy", path, tmp_path / "data/toy")
    assert "toy/a" not in tree(tmp_path / "data")


def test_a_killed_unpacking_leaves_nothing_at_its_place_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    root = tmp_path / "data/toy"
    killed = python(
        "import os, shutil, signal; from pathlib import Path; from convlora.fetch import unpack\n"
        "def copy(source, target, *_):\n"
        "    target.write(b'o'); target.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"shutil.copyfileobj = copy; unpack('toy', Path({str(archive)!r}), Path({str(root)!r}))"
    )
    assert killed.wait() == -signal.SIGKILL
    assert not root.exists()
    assert tree(tmp_path / "data")["toy.unpacking/toy/images/1.png"] == b"o"
    (tmp_path / "data/toy.unpacking/toy/images/2.png").touch()
    unpack("toy", archive, root)
    assert tree(tmp_path / "data") == FILES


def test_what_is_there_is_kept_aside_and_a_warning_says_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    root = tmp_path / "data/toy"
    own = {"masks/1.png": b"painted anew", "mine.txt": b"a user's own"}
    for name, content in own.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    unpack("toy", archive, root)
    assert {f"toy/{name}": content for name, content in tree(root).items()} == FILES
    [former] = set((tmp_path / "data").iterdir()) - {root}
    assert tree(former) == own
    assert f"toy: what was in {root} is now in {former}" in caplog.text


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "data/toy").mkdir(parents=True)
    unpack("toy", make_zip(tmp_path / "a.zip", FILES), tmp_path / "data/toy")
    assert tree(tmp_path / "data") == FILES
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["toy"]


def test_a_link_to_another_disk_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy").symlink_to(tmp_path / "large/sets")
    unpack("toy", make_zip(tmp_path / "a.zip", FILES), tmp_path / "data/toy")
    assert (tmp_path / "data/toy").is_symlink()
    assert {f"toy/{name}": content for name, content in tree(tmp_path / "large/sets").items()} == FILES


@pytest.mark.parametrize("kind", ["damaged", "disk"])
def test_what_is_there_stays_where_the_archive_cannot_be_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    archive = make_zip(tmp_path / "a.zip", {**FILES, "toy/a": np.random.default_rng(0).bytes(5000)})
    (tmp_path / "data/toy").mkdir(parents=True)
    (tmp_path / "data/toy/mine.txt").touch()
    if kind == "damaged":
        content = archive.read_bytes()
        archive.write_bytes(content.replace(content[1000:1040], b"?" * 40))
    else:
        monkeypatch.setattr(module.shutil, "copyfileobj", full)
    with pytest.raises((ValueError, OSError), match=r"toy: .*(damaged|full)"):
        unpack("toy", archive, tmp_path / "data/toy")
    assert tree(tmp_path / "data") == {"toy/mine.txt": b""}


def test_too_small_a_disk_is_told_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", {"toy/a": bytes(5_000_000)})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(2**20))
    with pytest.raises(OSError, match=r"toy: .* is full \(5 MiB are needed, 1 MiB are left\)"):
        unpack("toy", archive, tmp_path / "toy")
    assert tree(tmp_path).keys() == {"a.zip"}


def test_a_kill_before_a_small_file_has_its_text_does_no_harm(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path, _: str) -> int:
        path.touch()
        raise KeyboardInterrupt

    def get() -> Path:
        return fetch("toy", server.url, tmp_path / "toy.zip")

    server.faults = ["truncate"] * TRIES
    with pytest.raises(OSError, match="could not download"):
        get()
    (tmp_path / "toy.zip.part.tag").write_text("")
    server.body, server.etag = BODY[::-1], ""  # a server that takes no tag for any tag
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert get().read_bytes() == BODY[::-1]


def test_an_empty_record_is_written_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy.zip.sha256").touch()
    fetch("toy", server.url, tmp_path / "toy.zip")
    assert (tmp_path / "toy.zip.sha256").read_text() == f"{SHA256}  toy.zip\n"


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_a_damaged_tar_is_named_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a", {"toy/a": BODY[:400_000]}, kind)
    content = bytearray(path.read_bytes())
    content[200_000:200_200] = b"?" * 200
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"toy: .*a is damaged .*; delete it and run again, or unpack it by hand"
    ):
        unpack("toy", path, tmp_path / "data/toy")
    assert tree(tmp_path).keys() == {"a"}


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_while_unpacking_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfileobj", full)
        with pytest.raises(OSError, match=r"toy: the disk of .* is full .*; free some and run again"):
            unpack("toy", archive, tmp_path / "data/toy")
    assert not any((tmp_path / "data").iterdir())
    unpack("toy", archive, tmp_path / "data/toy")
    assert tree(tmp_path / "data") == FILES


def test_devices_in_a_zip_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("toy/pipe")
    info.external_attr = (stat.S_IFIFO | 0o644) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, b"")
    with pytest.raises(ValueError, match=r"'toy/pipe' is a link or a device"):
        unpack("toy", tmp_path / "a.zip", tmp_path / "data")


def test_only_the_folder_of_the_data_set_is_unpacked(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {**FILES, "sitecustomize.py": b"evil", "other/train.csv": b"evil"})
    unpack("toy", archive, tmp_path / "data/toy")
    assert tree(tmp_path / "data") == FILES
    with pytest.raises(ValueError, match=r"a\.zip has no folder isic"):
        unpack("isic", archive, tmp_path / "data/isic")


def test_encrypted_archives_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", FILES)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # flags of a file and of its entry
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"toy: .*a\.zip .*encrypted.*; delete it .*, or unpack it by hand"):
        unpack("toy", path, tmp_path / "data/toy")
    assert not any((tmp_path / "data").iterdir())
