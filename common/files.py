"""Files that are there whole or not at all: written under a temporary name, then renamed."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ended_in_order() -> Iterator[None]:
    """A request to end (SIGTERM) leaves the block as an error does, unless it is handled otherwise already. A second
    one does not break off what is done on the way out."""

    def end(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    in_main = threading.current_thread() is threading.main_thread()  # no other may say what a signal does
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def written_whole(path: Path | str) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block is through, removed when it fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with ended_in_order():
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """`content` into `path`, whole or not at all, and its folder, where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_file(path, text.encode())


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
