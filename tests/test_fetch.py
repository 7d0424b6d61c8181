"""Downloads from a real local server that breaks off, lies, stalls or changes its mind."""

import errno
import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from conftest import ROOT

from convlora.data import download
from convlora.data.download import fetch, unpack
from convlora.data.module import Source

BODY = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


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
        return f"http://127.0.0.1:{self.server_port}/sets/toy.zip"


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
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "TIMEOUTS", (5.0, 1.5))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_file_arrives_and_its_hash_is_recorded(server: Server, tmp_path: Path) -> None:
    path = fetch("toy", Source(url=server.url), tmp_path / "new")
    assert path.read_bytes() == BODY
    assert (tmp_path / "new/toy.zip.sha256").read_text() == f"{SHA256}  toy.zip\n"
    assert sorted(file.name for file in path.parent.iterdir()) == ["toy.zip", "toy.zip.sha256"]


def test_what_is_there_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    for _ in range(3):
        fetch("toy", Source(url=server.url), tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_a_broken_download_goes_on_where_it_stopped(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults = [fault, fault]
    assert fetch("toy", Source(url=server.url, sha256=SHA256), tmp_path).read_bytes() == BODY
    first, second, third = server.requests
    assert "Range" not in first
    assert 0 < int(second["Range"][6:-1]) < int(third["Range"][6:-1]) < len(BODY)


def test_the_next_run_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncate"] * download.TRIES
    message = (
        rf"toy: could not download http.* in {download.TRIES} tries .* run again to go on .*toy\.zip by hand"
    )
    with pytest.raises(OSError, match=message):
        fetch("toy", Source(url=server.url), tmp_path)
    assert not (tmp_path / "toy.zip").exists()
    arrived = (tmp_path / "toy.zip.part").stat().st_size
    assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == BODY
    assert server.requests[-1]["Range"] == f"bytes={arrived}-"


def test_a_slow_server_is_waited_for(server: Server, tmp_path: Path) -> None:
    server.faults = ["trickle"]
    server.body = BODY[:1_000_000]
    assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == server.body
    assert len(server.requests) == 1


@pytest.mark.parametrize("etag", ['"two"', None, 'W/"one"'])
def test_a_file_that_may_have_changed_starts_anew(server: Server, tmp_path: Path, etag: str | None) -> None:
    """Another tag, none, and a weak one, which does not promise the same bytes."""
    server.faults = ["truncate"] * download.TRIES
    server.body = BODY[::-1]
    if etag is None or etag.startswith("W/"):
        server.etag = etag
    with pytest.raises(OSError, match="could not download"):
        fetch("toy", Source(url=server.url), tmp_path)
    server.body, server.etag = BODY, etag
    assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == BODY


def test_a_server_that_cannot_go_on_starts_anew(server: Server, tmp_path: Path) -> None:
    server.ranges, server.faults = False, ["truncate"]
    assert fetch("toy", Source(url=server.url, sha256=SHA256), tmp_path).read_bytes() == BODY


def test_a_file_that_has_shrunk_starts_anew(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncate", 416]
    assert fetch("toy", Source(url=server.url, sha256=SHA256), tmp_path).read_bytes() == BODY
    assert "Range" not in server.requests[-1]


def test_another_part_than_asked_for_starts_anew(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncate", "wrong part"]
    assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == BODY
    assert "Range" in server.requests[1]
    assert "Range" not in server.requests[2]


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, code: int) -> None:
    server.faults = [code, code]
    assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("code", [403, 404])
def test_a_file_that_is_not_there_is_asked_for_once(server: Server, tmp_path: Path, code: int) -> None:
    server.faults = [code]
    with pytest.raises(
        OSError, match=rf"toy: could not download http.*{code}.*put the file at .*toy\.zip by hand"
    ):
        fetch("toy", Source(url=server.url), tmp_path)
    assert len(server.requests) == 1


def test_no_server_at_all_is_one_clear_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TRIES", 2)
    with pytest.raises(OSError, match=r"toy: could not download http://127\.0\.0\.1:9/a\.zip in 2 tries"):
        fetch("toy", Source(url="http://127.0.0.1:9/a.zip"), tmp_path)


def test_a_corrupted_file_is_refused_and_downloaded_anew(server: Server, tmp_path: Path) -> None:
    server.body = BODY[:-1] + b"x"
    with pytest.raises(ValueError, match=rf"toy: http.* has not the SHA-256 {SHA256}.*run again"):
        fetch("toy", Source(url=server.url, sha256=SHA256), tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.body = BODY
    assert fetch("toy", Source(url=server.url, sha256=SHA256), tmp_path).read_bytes() == BODY


def test_a_recorded_hash_is_checked_ever_after(server: Server, tmp_path: Path) -> None:
    fetch("toy", Source(url=server.url), tmp_path).unlink()
    server.body, server.etag = BODY[::-1], '"two"'
    with pytest.raises(
        ValueError, match=rf"has not the SHA-256 {SHA256}.*delete .*toy\.zip\.sha256 if its owner"
    ):
        fetch("toy", Source(url=server.url), tmp_path)


def test_a_damaged_copy_is_replaced(server: Server, tmp_path: Path) -> None:
    fetch("toy", Source(url=server.url), tmp_path).write_bytes(b"damaged")
    assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == BODY


def test_too_small_a_disk_is_told_before_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: Usage(2**20))
    with pytest.raises(OSError, match=r"toy: .* needs 3 MiB and has 1 MiB left; free some"):
        fetch("toy", Source(url=server.url), tmp_path)
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
        with pytest.raises(OSError, match=r"toy: the disk of .* is full; free some and run again to go on"):
            fetch("toy", Source(url=server.url), tmp_path)
    assert (tmp_path / "toy.zip.part").is_file()
    assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == BODY


def test_a_killed_download_is_finished_by_the_next_run(server: Server, tmp_path: Path) -> None:
    server.faults = ["trickle"]
    code = (
        "import sys; from pathlib import Path; from convlora.data.module import Source; "
        "from convlora.data.download import fetch; fetch('toy', Source(url=sys.argv[1]), Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, server.url, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"},
    )
    part = tmp_path / "toy.zip.part"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "toy.zip").exists()
    assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == BODY
    assert server.requests[-1]["Range"].startswith("bytes=")


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
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("cut", [0, 100, -30])
def test_damaged_archives_are_named(cut: int, tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"toy/a": np.random.default_rng(0).bytes(5000)})
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:cut] if cut else bytes(content[:200]) + b"?" * 40 + bytes(content[240:]))
    with pytest.raises(ValueError, match=r"toy: .*a\.zip is damaged .*; delete it and run again"):
        unpack("toy", path, tmp_path / "data/toy")
    assert "toy/a" not in tree(tmp_path / "data")


def test_an_interrupted_unpacking_is_finished(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    folder = tmp_path / "data"
    unpack("toy", archive, folder / "toy")
    (folder / "toy/masks/1.png").write_bytes(b"tw")  # as if it had been killed
    (folder / "toy/train.csv").unlink()
    (folder / "toy/mine.txt").write_text("a user's own")
    unpack("toy", archive, folder / "toy")
    assert tree(folder) == {**FILES, "toy/mine.txt": b"a user's own"}


def test_too_small_a_disk_is_told_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", {"toy/a": bytes(5_000_000)})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: Usage(2**20))
    with pytest.raises(OSError, match=r"toy: .* needs 5 MiB and has 1 MiB left"):
        unpack("toy", archive, tmp_path / "toy")
    assert tree(tmp_path).keys() == {"a.zip"}


def test_tags_are_stored_beside_the_part(server: Server, tmp_path: Path) -> None:
    server.faults = ["truncate"] * download.TRIES
    with pytest.raises(OSError, match="could not download"):
        fetch("toy", Source(url=server.url), tmp_path)
    assert json.loads((tmp_path / "toy.zip.part.tag").read_text()) == '"one"'


def test_small_files_are_written_in_full_or_not_at_all(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after a file is opened and before its text is in it."""

    def interrupted(path: Path, _: str) -> int:
        path.touch()
        raise KeyboardInterrupt

    for tag in ('"one"', None):  # the tag file comes first; without one, the record
        server.etag = tag
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fetch("toy", Source(url=server.url), tmp_path)
        assert fetch("toy", Source(url=server.url), tmp_path).read_bytes() == BODY
        for file in ("toy.zip", "toy.zip.sha256"):
            (tmp_path / file).unlink()


def test_an_empty_record_is_written_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "toy.zip.sha256").touch()
    fetch("toy", Source(url=server.url), tmp_path)
    assert (tmp_path / "toy.zip.sha256").read_text() == f"{SHA256}  toy.zip\n"


@pytest.mark.parametrize("kind", ["gz", "xz"])
def test_a_damaged_tar_is_named_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a", {"toy/a": BODY[:400_000]}, kind)
    content = bytearray(path.read_bytes())
    content[200_000:200_200] = b"?" * 200
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"toy: .*a is damaged .*; delete it and run again"):
        unpack("toy", path, tmp_path / "data/toy")
    assert tree(tmp_path).keys() == {"a"}


def test_what_is_unpacked_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_zip(tmp_path / "a.zip", FILES)
    unpack("toy", archive, tmp_path / "data/toy")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: Usage(0))
    unpack("toy", archive, tmp_path / "data/toy")
    assert tree(tmp_path / "data") == FILES


def test_a_disk_that_fills_up_while_unpacking_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = make_zip(tmp_path / "a.zip", FILES)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "copyfileobj", full)
        with pytest.raises(OSError, match=r"toy: the disk of .* is full; free some and run again"):
            unpack("toy", archive, tmp_path / "data/toy")
    unpack("toy", archive, tmp_path / "data/toy")
    assert tree(tmp_path / "data").items() >= FILES.items()


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
