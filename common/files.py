"""Files that are there whole or not at all: written under a temporary name, then renamed."""

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TO_END = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # requests to end


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder, renamed to it when the block is through, removed when it
    fails. An OSError that names no file (a full disk) or the temporary one is made to name `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():  # a folder cannot take the place of another that is not empty
            remove(path)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename, error.strerror = str(path), f"not written: {error.strerror or error}"
        raise
    finally:
        remove(temporary)


def remove_unfinished(folder: Path, names: str, is_locked: bool = False) -> None:
    """Remove the temporary files and folders of killed processes for names that match the regular expression `names`.
    Those of a running process stay, unless this process has locked the folder: then its process id was only reused."""
    for path in sorted(folder.glob(".*.tmp")):
        match = re.fullmatch(rf"\.(?:{names})\.(\d{{1,9}})\.tmp", path.name)
        if match and (is_locked or has_ended(int(match[1]))):
            print(f"removed: {path}, which an earlier process could not finish")
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def has_ended(pid: int) -> bool:
    """Whether a process of this machine has ended."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)  # the other error is that it is somebody else's
    return False


def lock_folder(folder: Path, names: str) -> TextIO:
    """Create `folder` and lock it until the returned file is closed or the process ends. Remove what earlier processes
    could not finish (`remove_unfinished`). ValueError where another process holds the lock. Windows and file systems
    without locks (some network disks) protect nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a", encoding="utf-8")  # noqa: SIM115, the lock lasts as long as the file is open
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, this lock is not inherited by workers
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}: another process is writing there; wait for it, or name another folder") from None
    except OSError:
        pass
    remove_unfinished(folder, names, is_locked=True)
    return file


def write_file(path: Path, content: bytes) -> None:
    """`content` into `path`, whole or not at all, and its folder, where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8. A surrogate, which stands for a byte of a file's name that is not UTF-8, becomes "?"."""
    write_file(path, text.encode("utf-8", "replace"))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, error: type[ValueError] = ValueError) -> dict:
    """A JSON object. An `error`, in one line, where the file holds none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as problem:  # ValueError: bad JSON and bad UTF-8 alike
        raise error(f"{path}: not readable as JSON ({problem})") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def fingerprint(files: Iterable[Path | str], *settings: object, pages: int = 64) -> str:
    """A short hash of files and settings, from the files' sizes and about so many pages of each: copies have the same
    one, and any training changes it."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        size = os.path.getsize(path)
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(4096, size // pages)):
                file.seek(start)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]
