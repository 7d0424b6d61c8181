"""Files from the net, weights and archives of data sets: there as a whole or not at all."""

import errno
import gzip
import hashlib
import logging
import lzma
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import huggingface_hub
import requests
from filelock import FileLock
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

CHUNK = 2**16  # bytes; a broken connection loses one
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between the tries
TIMEOUTS = (10.0, 60.0)  # seconds to connect, and without a byte
PASSING_CODES = frozenset({408, 425, 429, 500, 502, 503, 504})  # after which a server is asked again
BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
PLAIN = (0, stat.S_IFREG, stat.S_IFDIR)  # file types that are unpacked

log = logging.getLogger(__name__)


def fetch(name: str, url: str, path: Path, sha256: str | None = None) -> Path:
    """Return the verified file at `path`, downloaded where it is not there yet.

    A broken download is resumed, in this run or the next. Where no hash is published, that of the first
    download is recorded in `<path>.sha256`, and every later one must have it. A file that was put at `path`
    by hand is held against the same hashes, but never recorded, overwritten or removed.

    Args:
        name: of what the file belongs to, for messages.
        url: of the file.
        path: of the copy.
        sha256: as published, hexadecimal; its first digits are enough.

    Raises:
        OSError: the server cannot be reached or has no such file, or the disk is full; what has arrived is
            kept.
        ValueError: the file has not the hash that it should have; one that was just downloaded is removed.
    """
    if path.is_file():
        _verify(name, path, path, sha256)
        return path
    with _writing(name, path):
        if not path.is_file():  # another process may have been first
            log.info("%s: downloading %s to %s", name, url, path)
            part = Path(f"{path}.part")
            _download(name, url, part, path)
            _verify(name, path, part, sha256)
            part.replace(path)
    return path


def fetch_from_hub(repository: str, revision: str | None, name: str) -> Path:
    """Return a file of a repository on the Hugging Face Hub, in the hub's own cache.

    Args:
        repository: USER/REPO.
        revision: branch, tag or commit; None takes the newest.
        name: of the file.

    Raises:
        FileNotFoundError: there is no such repository, revision or file, or it is not for this user.
        OSError: the hub cannot be reached, and the cache lacks the file; or the disk is full.
    """
    where = f"no {repository} here"
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "the hub has no such repository, or it is private (`hf auth login`)"
        raise FileNotFoundError(f"{where}, and {reason}; name a run's folder, or USER/REPO") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} on the hub has no revision {revision}; name another"
        ) from error
    except LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "it is not reached"
        reason = f"the hub was not asked or did not answer ({offline})"
        raise OSError(
            f"{where} nor in the hub's cache, and {reason}; name a run's folder, or try again"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repository} on the hub has no {name}; name one that has") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"{repository}: could not get {name} from the hub ({reason}); try again") from error


def unpack(name: str, archive: Path, root: Path) -> None:
    """Unpack the folder `root.name` of a zip or tar archive as `root`, and nothing outside it.

    It is unpacked beside `root`, and renamed when it is whole. Whatever is in `root` by then is left as it
    is, in a folder `<root>.<date and time>` that a warning names.

    Raises:
        OSError: the disk has no room; nothing has changed.
        ValueError: the archive is damaged, encrypted, or holds links or paths that lead outside; nothing has
            changed.
    """
    folder, root = root.name, root.resolve()  # a link may lead to another disk
    unpacked = Path(f"{root}.unpacking")
    with _writing(name, root):
        shutil.rmtree(unpacked, ignore_errors=True)  # of a run that was killed
        try:
            _unpack(name, archive, folder, unpacked)
            if root.is_dir() and any(root.iterdir()):
                former = root.rename(f"{root}.{time.strftime('%Y-%m-%d_%H-%M-%S')}")
                log.warning("%s: what was in %s is now in %s", name, root, former)
            (unpacked / folder).rename(root)
        except (*BROKEN, RuntimeError) as error:  # the last for what is encrypted or of an unknown method
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{name}: {archive} is damaged or no zip or tar archive that can be read here ({reason}); "
                "delete it and run again, or unpack it by hand"
            ) from error
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal; it is computed again only if the file has changed."""
    status = path.stat()
    return _hash(path, status.st_ino, status.st_size, status.st_ctime_ns)


@cache
def _hash(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(name: str, path: Path) -> Iterator[None]:
    """Let one process at a time make `path`, and say what to do where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{path}.lock")
    try:
        with FileLock(lock):
            try:
                yield
            finally:
                with suppress(PermissionError):  # Windows removes no open file
                    lock.unlink()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"{name}: the disk of {path.parent} is full ({error.strerror}); free some and run again"
        ) from error


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are left")


def _verify(name: str, path: Path, file: Path, sha256: str | None) -> None:
    """Hold `path`, or `file` that is to become it, against its published hash or else the recorded one."""
    record = Path(f"{path}.sha256")
    known = sha256 or (record.read_text().partition(" ")[0] if record.is_file() else "")
    if known and not hash_file(file).startswith(known.lower()):
        found, way_out = hash_file(file), "delete it to download it again"
        if file != path:
            file.unlink()
            way_out = "run again to download it anew"
        doubt = "ask its owner" if sha256 else f"delete {record} if its owner changed it"
        raise ValueError(
            f"{name}: the SHA-256 of {path} is {found} and should start with {known}; {way_out}, or {doubt}"
        )
    if not known and file != path:
        record.write_text(f"{hash_file(file)}  {path.name}\n")


def _download(name: str, url: str, part: Path, path: Path) -> None:
    tag_file = Path(f"{part}.tag")
    for pause in (*PAUSES, None):
        try:
            _continue(name, url, part, tag_file)
            break
        except requests.RequestException as error:
            if pause is None or isinstance(error, requests.HTTPError | ValueError):  # no file, or no URL
                reason = getattr(next(iter(error.args), None), "reason", error)  # without urllib3's wrapping
                raise OSError(
                    f"{name}: could not download {url} ({reason}); run again to go on where it stopped, or "
                    f"put the file at {path} by hand"
                ) from error
            time.sleep(pause)
    tag_file.unlink()


def _continue(name: str, url: str, part: Path, tag_file: Path) -> None:
    """Download what is missing of `part`; all of it where the server has another file by now."""
    tag = tag_file.read_text() if part.is_file() and tag_file.is_file() else ""
    start = part.stat().st_size if tag else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
        code, sent = response.status_code, response.headers
        if code in PASSING_CODES:
            raise requests.ConnectionError(f"HTTP {code} {response.reason}")
        if code in (206, 416) and not sent.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("the server has another part than was asked for")
        response.raise_for_status()
        start = start if code == requests.codes.partial_content else 0
        length = int(sent.get("Content-Length", 0))
        _check_room(part.parent, length)
        with part.open("ab" if start else "wb") as file, _progress() as progress:
            if not start:
                tag = sent.get("ETag") or sent.get("Last-Modified") or ""
                tag_file.write_text("" if tag.startswith("W/") else tag)  # weak: perhaps other bytes
            bar = progress.add_task(name, total=start + length or None, completed=start)
            for chunk in response.iter_content(CHUNK):
                file.write(chunk)
                progress.advance(bar, len(chunk))


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _unpack(name: str, archive: Path, folder: str, target: Path) -> None:
    wanted, size = [], 0
    with (zipfile.ZipFile if zipfile.is_zipfile(archive) else tarfile.open)(archive) as file:
        for path, length, plain, member in _members(file):
            parts, anywhere = PurePosixPath(path).parts, PureWindowsPath(path)  # both slashes, and drives
            outside = anywhere.anchor or ".." in anywhere.parts
            if outside or not plain:
                raise ValueError(
                    f"{name}: {archive} was not unpacked, {path!r} "
                    f"{'leads outside the folder' if outside else 'is a link or a device'}; take the archive "
                    "from its owner"
                )
            if len(parts) > 1 and parts[0] == folder and parts[-1] != ".DS_Store":
                wanted.append(member)
                size += length
        if not wanted:
            raise ValueError(f"{name}: {archive} has no folder {folder}; delete it and run again")
        _check_room(target.parent, size)
        file.extractall(target, wanted)


def _members(file: zipfile.ZipFile | tarfile.TarFile) -> list[tuple[str, int, bool, Any]]:
    """List path, size, whether it is a plain file or folder, and the archive's own entry."""
    if isinstance(file, zipfile.ZipFile):
        return [
            (info.filename, info.file_size, stat.S_IFMT(info.external_attr >> 16) in PLAIN, info)
            for info in file.infolist()
        ]
    file.extraction_filter = tarfile.data_filter
    members = [(info.name, info.size, info.isfile() or info.isdir(), info) for info in file]
    assert file.fileobj is not None
    while file.fileobj.read(CHUNK):  # gzip and xz check their sums at the very end
        pass
    return members
