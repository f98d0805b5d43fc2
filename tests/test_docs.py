"""What the documents say stays true: commands parse, files and links exist, the figure has the code's sizes, and
nothing that is read is executed. The README stays short."""

import argparse
import ast
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

from llama import LlamaConfig
from mapper import VokenMapper
from qformer import QFormerConfig, VisionConfig
from unet import UNetConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("[a-z]*/README.md"))]
PACKAGES = ("common", "published", "tars", "trainer", "evaluation", "baselines", "experiments", "miniature")
SCRIPTS = [
    path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("tests/stress/*.py")])
    if path.name != "__init__.py"
]
OTHER_OPTIONS = {"--help", "--gpu", "--golden", "--repo-type", "--local-dir"}  # of pytest and of hf download


class ParsedError(BaseException):
    """A command has read its command line; `parser` is what read it."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def read_command_line(words: list[str], parse: bool) -> argparse.ArgumentParser:
    """Run a command up to its parser: `words` are those after "python". With `parse` the parser reads the rest of the
    line, as it would; SystemExit says that it cannot."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, args=None, namespace=None):
        if not parse:
            raise ParsedError(parser)
        parsed = original(parser, args, namespace)
        if args == []:  # common.cli asks a parser for its defaults before it reads the line
            return parsed
        raise ParsedError(parser)

    module = words[0] == "-m"
    name, *rest = words[1:] if module else words
    argv = mock.patch.object(sys, "argv", [str(ROOT / name), *(rest if parse else [])])
    path = mock.patch.object(sys, "path", [str((ROOT / name).parent), *sys.path])
    with argv, path, mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            if module:
                runpy.run_module(name, run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        except ParsedError as parsed:
            return parsed.parser
    raise AssertionError(f"{name} read no command line")


@cache
def options_of(*words: str) -> frozenset[str]:
    """All options of a command and of its subcommands."""
    found, parsers = set(), [read_command_line([*words], parse=False)]
    while parsers:
        for action in parsers.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return frozenset(found)


@cache
def all_options() -> frozenset[str]:
    """The options of every command of the project."""
    names = [path.relative_to(ROOT) for path in SCRIPTS if is_command(path)]
    words = [("-m", name.parts[0]) if name.name == "__main__.py" else (name.as_posix(),) for name in names]
    return frozenset().union(OTHER_OPTIONS, *(options_of(*word) for word in words))


def is_command(path: Path) -> bool:
    return path.name == "__main__.py" or '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")


def python_commands(lines: str) -> list[list[str]]:
    """The commands of the project in lines of a shell, each without "python"; torchrun's options are left out."""
    found = []
    for line in lines.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            if command and command[0] == "torchrun":
                found.append(command[next(i for i, word in enumerate(command) if word.endswith(".py")) :])
            elif command and command[0].split("/")[-1] == "python":
                found.append(command[1:])
    return found


def blocks_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


def spans_of(page: Path) -> list[str]:
    """Code within sentences and tables."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def docstring_commands(path: Path) -> str:
    """Lines of a command's docstring that show how to call it."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = re.sub(r"[][]", "", text.replace("\\\n", " "))  # brackets stand around what may be left out
    return "\n".join(line for line in text.splitlines() if re.match(r" {4}(python|torchrun) ", line))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- the README


def test_readme_is_short():
    size, lines = len(README.encode()), README.count("\n")
    print(f"{lines} lines, {size:,} bytes")
    assert lines <= 190 and size <= 14 * 1024


def test_readme_has_the_two_commands():
    """.ci/run takes the second one from here."""
    for mark, word in (("a picture", "sample.py"), ("the tests", "pytest")):
        assert word in re.search(rf"<!-- {mark} -->\n```bash\n(.*?)\n```", README, re.DOTALL)[1]


def test_reading_order_names_every_file_of_the_top_level():
    section = README.split("### Reading order")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) <= 15 and all(len(row) == 3 for row in rows)
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row[1])]
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert {path.name for path in ROOT.glob("*.py")} - set(named) == set()
    assert len(set(named)) == len(named)


# ---- all pages


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page):
    """Each command in a block is read by its own parser, options, values and all."""
    for words in python_commands(blocks_of(page)):
        print("python", *words)
        read_command_line(words, parse=True)


@pytest.mark.parametrize("path", [path for path in SCRIPTS if docstring_commands(path)], ids=name_of)
def test_commands_in_docstrings_parse(path):
    for words in python_commands(docstring_commands(path)):
        print("python", *words)
        read_command_line(words, parse=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_in_sentences_is_right(page):
    """Commands have the options that are named with them, files are there, and so are functions and classes."""
    for span in spans_of(page):
        words = re.sub(r"[][]", "", span).split()
        if words[0] == "python":
            words = words[1:]
        options = {word.split("=")[0] for word in words if re.match(r"--\w", word)}
        if words and words[0] == "-m":
            assert options <= options_of(*words[:2]), span
        elif words and re.fullmatch(r"[\w/]+\.(py|md)", words[0]):
            files = [folder / words[0] for folder in (page.parent, ROOT) if (folder / words[0]).exists()]
            assert files, f"{span}: no such file"
            assert not options or any(options <= options_of(name_of(file)) for file in files), span
        elif options and words[0] not in ("pip", "hf", "pytest", "torchrun"):
            assert options <= all_options(), span
        elif match := re.fullmatch(r"(\w+)\.([\w.]+)(\(.*\))?", span):
            file = ROOT / f"{match[1].lower()}.py"
            if file.exists():
                nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
                names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
                assert set(match[2].split(".")) <= names, span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_a_wrong_command_is_found():
    """The checks above can fail: a script that is missing, an option, a choice, a word too many."""
    assert python_commands("a && python -m tars vist x --out y  # why\ntorchrun --n 2 a.py --b \\\n c") == [
        ["-m", "tars", "vist", "x", "--out", "y"],
        ["a.py", "--b", "c"],
    ]
    read_command_line(["sample.py", "--prompt", "a boat"], parse=True)
    for words in (["sample.py", "--promt", "a"], ["sample.py", "--steps", "many"], ["-m", "tars", "coco", "a"]):
        with pytest.raises(SystemExit):
            read_command_line(words, parse=True)
    with pytest.raises(FileNotFoundError):
        read_command_line(["simple.py"], parse=True)
    assert "--prompt" in options_of("sample.py") and "--promt" not in options_of("sample.py")


# ---- the figure, and what docs/security.md says


def test_figure_says_the_published_sizes():
    svg = (ROOT / "docs" / "how-it-works.svg").read_text(encoding="utf-8")
    vision, qformer, llama, unet = VisionConfig(), QFormerConfig(), LlamaConfig(), UNetConfig()
    with torch.device("meta"):
        queries, width = VokenMapper().t2i_decoder_prompt.shape[1:]
    latents = (unet.in_channels, unet.sample_size, unet.sample_size)
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    shapes = [(3, vision.image_size, vision.image_size), (patches, vision.hidden_size), latents, (queries, width)]
    shapes += [(qformer.num_query_tokens, size) for size in (qformer.hidden_size, llama.hidden_size)]
    shapes += [(8, width), (9, llama.hidden_size), (llama.vocab_size, llama.hidden_size)]
    assert not [shape for shape in shapes if str(shape) not in svg]
    assert f"(T, {llama.vocab_size + 9})" in svg and unet.cross_attention_dim == width
    assert not [name for name in re.findall(r"[\w/]+\.py", svg) if not (ROOT / name).exists()]


def test_nothing_that_is_read_is_executed():
    """Each pickle is read with weights_only, in the three places that docs/security.md names; no text becomes code."""
    loads = set()
    for path in (path for folder in (".", *PACKAGES) for path in ROOT.glob(f"{folder}/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "marshal", "dill", "yaml"} & {module.split(".")[0] for module in imports(tree)}, path
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                name, options = ast.unparse(call.func), {o.arg: ast.unparse(o.value) for o in call.keywords}
                assert name not in ("eval", "exec", "compile", "os.system"), f"{path}:{call.lineno}"
                assert "trust_remote_code" not in options and options.get("allow_pickle", "False") == "False", path
                assert name != "torch.load" or options.get("weights_only") == "True", f"{path}:{call.lineno}"
                loads |= {name_of(path)} if name == "torch.load" else set()
    assert loads == {"evaluation/scorers.py", "experiments/pretrain.py", "published/convert.py"}


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
