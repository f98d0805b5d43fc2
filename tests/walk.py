"""How far a reader has to walk: the calls that cross files while one voken and one training sample pass through.

    python tests/walk.py [--list]

A crossing is a pair of functions in two files of this project, the first of which calls the second; each counts once,
however often it happens, and so does the start of a class. `voken`: `sample.py` from a prompt to a picture. `sample`:
two steps of `train_uas.py` from a tar to the checkpoint. Imports, tests and the miniature's own drawing of data do not
count. Run it in another checkout by copying it there.
"""

import contextlib
import io
import runpy
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = ("<module>", "Uninitialised.__torch_function__")  # the second stands between all of torch's functions
sys.path.insert(0, str(ROOT))


def crossings(argv: list[str]) -> set[tuple[str, str, str, str]]:
    """(file, function, file, function) of every call from one of the project's files into another."""
    found = set()

    def place(frame) -> tuple[str, str] | None:
        path = frame.f_code.co_filename
        if not path.startswith(f"{ROOT}/") or "/tests/" in path or "site-packages" in path:
            return None
        name = frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name
        return path.removeprefix(f"{ROOT}/"), name

    def watch(frame, event, _argument) -> None:
        if event != "call" or (callee := place(frame)) is None or callee[1] in HIDDEN:
            return
        caller = frame.f_back
        while caller is not None and place(caller) is None:  # through torch's __call__, map() and the like
            caller = caller.f_back
        where = place(caller) if caller is not None else None
        if where is not None and where[1] != "<module>" and where[0] != callee[0]:
            found.add((*where, *callee))

    sys.argv = argv
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def main() -> None:
    listed = "--list" in sys.argv
    with tempfile.TemporaryDirectory() as folder:
        tar = f"{folder}/pairs.tar"
        sys.argv = ["world.py", "pairs", "--n", "40", "--out", tar]
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / "miniature" / "world.py"), run_name="__main__")
        sample = ["sample.py", "--prompt", "a red boat", "--steps", "2", "--out", f"{folder}/out"]
        train = ["train_uas.py", "--data", tar, "--steps", "2", "--batch-size", "4", "--workers", "0"]
        for name, argv in (("voken", sample), ("sample", [*train, "--out", f"{folder}/run"])):
            found = crossings(argv)
            files = {path for caller, _, callee, _ in found for path in (caller, callee)}
            print(f"{name}: {len(found)} distinct calls across {len(files)} files")
            if listed:
                print("\n".join(f"  {a} {b} -> {c} {d}" for a, b, c, d in sorted(found)))


if __name__ == "__main__":
    main()
