"""Imports go one way. A test reads all of them, also those inside functions, and fails on a circle between files and on
an import from a higher layer."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_PRODUCT = ("tests", "docs")
LAYERS = [  # from the bottom to the top; a name is a package or a file of the top level
    {"common"},
    {"prompts", "llama", "qformer", "mapper", "scheduler", "unet", "vae", "text_encoder", "lora"},
    {"minigpt5"},
    {"generation"},
    {"published"},
    {"tars"},
    {"trainer"},
    {"miniature", "evaluation", "baselines"},
    {"sample", "train_uas", "train_mls"},
    {"demo"},
    {"experiments", "bench"},
]


def module_name(path: str) -> str:
    """ "common/cli.py" is common.cli, "common/__init__.py" is common."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported_names(path: str, source: str) -> set[str]:
    """Full names of everything that a file imports, wherever the import stands: of `from a import b` both a and a.b."""
    names = set()
    package = path.rpartition("/")[0].split("/")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("__import__", "import_module"):
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return names


def read_imports(files: dict[str, str]) -> dict[str, set[str]]:
    """For each file (path to source) the files that it imports. An import of a.b also runs a/__init__.py, unless
    the importing file stands in package a, whose __init__.py is running already."""
    paths = {module_name(path): path for path in files}
    graph = {}
    for path, source in files.items():
        names = imported_names(path, source)
        own_package = path.rpartition("/")[0].replace("/", ".")
        parents = {name.rpartition(".")[0] for name in names} - {own_package, ""}
        graph[path] = {paths[name] for name in names | parents if name in paths} - {path}
    return graph


def find_circles(graph: dict[str, set[str]]) -> list[str]:
    """Chains of imports that come back to their first file, as "a.py > b.py > a.py": none if and only if there is no
    circle. Of several circles through the same files some may show only after the first is mended."""
    circles, finished = [], set()

    def visit(path: str, chain: list[str]) -> None:
        if path in chain:
            circles.append(" > ".join([*chain[chain.index(path) :], path]))
        elif path not in finished:
            for imported in sorted(graph[path]):
                visit(imported, [*chain, path])
            finished.add(path)

    for path in sorted(graph):
        visit(path, [])
    return circles


def find_upward(graph: dict[str, set[str]], layers: list[set[str]]) -> list[str]:
    """Every import from a higher layer, as "a.py imports b/c.py". A file that no layer names is an error, too."""
    level = {name: number for number, names in enumerate(layers) for name in names}
    heights = {path: level.get(path.partition("/")[0].removesuffix(".py")) for path in graph}
    nameless = [f"{path} is in no layer" for path, height in heights.items() if height is None]
    edges = [
        (path, imported) for path in graph for imported in graph[path] if None not in (heights[path], heights[imported])
    ]
    return nameless + [
        f"{path} imports {imported}" for path, imported in sorted(edges) if heights[imported] > heights[path]
    ]


def product_files() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    paths = listed.stdout.split() if listed.returncode == 0 else []
    paths = paths or [path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]]
    paths = [path for path in paths if path.partition("/")[0] not in NOT_PRODUCT and (ROOT / path).exists()]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}


def test_no_import_circle():
    circles = find_circles(read_imports(product_files()))
    assert not circles, "\n".join(["", *circles])


def test_no_import_goes_up():
    upward = find_upward(read_imports(product_files()), LAYERS)
    assert not upward, "\n".join(["", *upward])


def test_every_layer_has_its_files():
    names = {path.partition("/")[0].removesuffix(".py") for path in product_files()}
    assert set.union(*LAYERS) - names == set(), "layers that no file stands for"


CLEAN = {"low.py": "import torch", "kit/__init__.py": "", "kit/a.py": "import low", "top.py": "from kit import a"}
TREES = {  # changed files, and what is found then
    "clean": ({}, [], []),
    "circle of files": (
        {"kit/b.py": "import kit.c", "kit/c.py": "from kit import b"},
        ["kit/b.py > kit/c.py > kit/b.py"],
        [],
    ),
    "circle in a function": (
        {"kit/b.py": "import kit.c", "kit/c.py": "def f():\n    from kit.b import x"},
        ["kit/b.py > kit/c.py > kit/b.py"],
        [],
    ),
    "circle of relative imports": (
        {"kit/b.py": "from . import c", "kit/c.py": "from .b import x"},
        ["kit/b.py > kit/c.py > kit/b.py"],
        [],
    ),
    "circle through __init__": (
        {"kit/__init__.py": "from low import x", "low.py": "import kit.a"},
        ["kit/__init__.py > low.py > kit/__init__.py", "low.py > kit/a.py > low.py"],
        ["low.py imports kit/__init__.py", "low.py imports kit/a.py"],
    ),
    "upward": ({"kit/a.py": "import top", "top.py": ""}, [], ["kit/a.py imports top.py"]),
    "upward in a method": (
        {"low.py": "class A:\n    def f(self):\n        from kit import name"},
        [],
        ["low.py imports kit/__init__.py"],
    ),
    "upward by a call": (
        {"low.py": "import importlib\nimportlib.import_module('top')", "kit/a.py": "", "top.py": ""},
        [],
        ["low.py imports top.py"],
    ),
    "no layer": ({"new.py": "import low"}, [], ["new.py is in no layer"]),
}


@pytest.mark.parametrize("name", TREES)
def test_checker_finds_what_is_wrong(name):
    changes, circles, upward = TREES[name]
    graph = read_imports(CLEAN | changes)
    assert find_circles(graph) == circles
    assert find_upward(graph, [{"low"}, {"kit"}, {"top"}]) == upward


SCRIPTS = ("sample", "train_uas", "train_mls", "evaluation.__main__", "published.__main__", "tars.__main__")
SCRIPTS += (
    "miniature.score",
    "experiments.pretrain",
    "baselines.stable_diffusion",
    "baselines.divter",
    "baselines.train_sd",
    "baselines.gill",
)
PROBE = """
import os, sys, importlib
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Finder())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_idle_threads_sleep(script):
    """Before torch is loaded, OpenMP is told that idle threads should sleep."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", PROBE, script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PASSIVE"]
