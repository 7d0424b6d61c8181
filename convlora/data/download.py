"""Archives of data sets: fetched, verified, unpacked; what was interrupted is finished by running again."""

import errno
import gzip
import json
import lzma
import shutil
import stat
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit

import pooch
import requests
from tqdm import tqdm

from convlora.data.module import Source

MEBIBYTE = 2**20
CHUNK = 2**16  # bytes; a broken connection loses one
TRIES = 5
PAUSE = 1.0  # seconds before the second try, twice as long before each further one
TIMEOUTS = (10.0, 60.0)  # seconds to connect, and without a byte
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
)
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP codes after which a server is asked again


def fetch(name: str, source: Source, folder: Path) -> Path:
    """Return the verified archive of a data set, downloaded where it is not there yet.

    A broken download is resumed, in this run or the next. Where no hash is published the archive's own is
    recorded in `<archive>.sha256` when it first arrives, and every later download must have it.

    Args:
        name: of the data set, for messages.
        source: has a `url`.
        folder: that the archive is put in.

    Raises:
        OSError: the server cannot be reached or has no such file, or the disk is full; what has arrived is
            kept.
        ValueError: the archive has not the hash that it should have; it is removed.
    """
    assert source.url is not None
    path = folder / PurePosixPath(urlsplit(source.url).path).name
    record = path.with_name(f"{path.name}.sha256")
    known = source.sha256 or (record.read_text().partition(" ")[0] if record.is_file() else None) or None
    folder.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(source.url, known, path.name, folder, downloader=partial(_download, name, path))
    except ValueError as error:
        where = f"delete {record} if its owner changed it" if source.sha256 is None else "ask its owner"
        raise ValueError(
            f"{name}: {source.url} has not the SHA-256 {known} that it should have ({error}); run again to "
            f"download it anew, or {where}"
        ) from error
    if known is None:
        _write_text(record, f"{pooch.file_hash(str(path))}  {path.name}\n")
    return path


def unpack(name: str, archive: Path, root: Path) -> None:
    """Unpack the folder `root.name` of a zip or tar archive as `root`, and nothing outside it.

    Files that are there in full are kept, so that an interrupted run is finished by the next.

    Raises:
        OSError: the disk has no room.
        ValueError: the archive is damaged, encrypted, or holds links or paths that lead outside; nothing is
            written in the latter cases.
    """
    try:
        with _members(archive) as members:
            for member in members:
                _check_member(name, archive, member)
            folder = root.parent
            files = [member for member in members if not member.skipped and member.is_in(root.name)]
            if not files:
                raise ValueError(f"{name}: {archive} has no folder {root.name}; delete it and run again")
            folder.mkdir(parents=True, exist_ok=True)
            files = [member for member in files if not _is_whole(folder / member.path, member)]
            _check_room(name, folder, sum(member.size for member in files))
            for member in files:
                _write(folder / member.path, member)
    except DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: {archive} is damaged or no zip or tar archive ({reason}); delete it and run again"
        ) from error
    except NotImplementedError as error:
        raise ValueError(f"{name}: {archive} cannot be unpacked here ({error}); unpack it by hand") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"{name}: the disk of {root.parent} is full; free some and run again to go on from there"
        ) from error


@dataclass(frozen=True)
class Member:
    """A file of an archive; `refusal` says why it must not be unpacked."""

    path: str
    size: int
    refusal: str
    open: Callable[[], IO[bytes]]

    @property
    def skipped(self) -> bool:
        """Whether it is a folder, or what only a Mac needs."""
        parts = PurePosixPath(self.path).parts
        return self.path.endswith("/") or not parts or parts[0] == "__MACOSX" or parts[-1] == ".DS_Store"

    def is_in(self, folder: str) -> bool:
        """Whether it lies in a folder at the top of the archive."""
        return PurePosixPath(self.path).parts[0] == folder


@contextmanager
def _members(archive: Path) -> Iterator[list[Member]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield [
                Member(info.filename, info.file_size, _refuse_zip(info), partial(file.open, info))
                for info in file.infolist()
            ]
    else:
        with tarfile.open(archive) as file:
            listed = [
                Member(
                    info.name + "/" * info.isdir(),
                    info.size,
                    "" if info.isfile() or info.isdir() else "is a link or a device",
                    partial(_open_tar, file, info),
                )
                for info in file
            ]
            assert file.fileobj is not None
            while file.fileobj.read(MEBIBYTE):  # gzip and xz check their sums at the very end
                pass
            yield listed


def _open_tar(file: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    content = file.extractfile(info)
    assert content is not None  # it is no folder
    return content


def _refuse_zip(info: zipfile.ZipInfo) -> str:
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return "is encrypted" if info.flag_bits & 1 else ""


def _check_member(name: str, archive: Path, member: Member) -> None:
    path = PurePosixPath(member.path.replace("\\", "/"))
    outside = path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1])
    if outside or member.refusal:
        raise ValueError(
            f"{name}: {archive} was not unpacked, {member.path!r} "
            f"{member.refusal or 'leads outside the folder'}; take the archive from its owner"
        )


def _is_whole(path: Path, member: Member) -> bool:
    return path.is_file() and path.stat().st_size == member.size


def _write(path: Path, member: Member) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with member.open() as source, part.open("wb") as file:
        shutil.copyfileobj(source, file)
    part.replace(path)


def _check_room(name: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{name}: {folder} needs {needed / MEBIBYTE:.0f} MiB and has {free / MEBIBYTE:.0f} MiB left; "
            "free some, or choose another data_root"
        )


class _PassingError(Exception):
    """The server says that another try may help."""


PASSING_ERRORS = (
    _PassingError,
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
)


def _download(name: str, path: Path, url: str, output_file: str, _: Any) -> None:
    """Download to `output_file`, by way of a part beside `path` that later tries and runs go on with."""
    part = path.with_name(f"{path.name}.part")
    pause = PAUSE
    for attempt in range(1, TRIES + 1):
        try:
            _continue(name, url, part)
        except PASSING_ERRORS as error:
            if attempt == TRIES:
                reason = getattr(next(iter(error.args), None), "reason", error)  # without urllib3's wrapping
                raise OSError(
                    f"{name}: could not download {url} in {TRIES} tries ({reason}); run again to go on where "
                    f"it stopped, or put the file at {path} by hand"
                ) from error
            time.sleep(pause)
            pause *= 2
        except requests.RequestException as error:
            raise OSError(
                f"{name}: could not download {url} ({error}); put the file at {path} by hand and run again"
            ) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                f"{name}: the disk of {part.parent} is full; free some and run again to go on from there"
            ) from error
        else:
            part.replace(output_file)
            _tag_file(part).unlink(missing_ok=True)
            return


def _continue(name: str, url: str, part: Path) -> None:
    """Download what is missing of `part`; all of it where the server has another file by now."""
    tag_file = _tag_file(part)
    start = part.stat().st_size if part.is_file() and tag_file.is_file() else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": json.loads(tag_file.read_text())}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()
            raise _PassingError("the server has less than has arrived")
        if response.status_code in PASSING:
            raise _PassingError(f"HTTP {response.status_code} {response.reason}")
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            start = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _PassingError("the server sent another part than it was asked for")
        length = response.headers.get("Content-Length")
        if length is not None:
            _check_room(name, part.parent, int(length))
        tag_file.unlink(missing_ok=True)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        with part.open("ab" if start else "wb") as file:
            if tag and not tag.startswith("W/"):  # a weak tag does not promise the same bytes
                _write_text(tag_file, json.dumps(tag))
            total = start + int(length) if length is not None else None
            shown = {"desc": name, "unit": "B", "unit_scale": True, "disable": not sys.stderr.isatty()}
            with tqdm(total=total, initial=start, **shown) as bar:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise _PassingError(f"{part.stat().st_size} bytes of {total} arrived")


def _write_text(path: Path, text: str) -> None:
    """Write all of a text or nothing, whenever this is killed."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")
