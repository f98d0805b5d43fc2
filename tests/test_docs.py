"""README's figure, reading order and security note stay true: the figure to the code, the order to the imports, the
note to what is called."""

import ast
import re
from pathlib import Path

import torch

from llama import LlamaConfig
from mapper import VokenMapper
from qformer import QFormerConfig, VisionConfig
from unet import UNetConfig

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "how-it-works.svg"
PACKAGES = ("baselines", "common", "evaluation", "miniature", "published", "tars", "trainer")
HELPERS = {"cli", "cpu", "files", "images", "loading"}  # README says so above its table


def test_figure_says_the_published_sizes():
    svg = FIGURE.read_text(encoding="utf-8")
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
    assert not [name for name in re.findall(r"\w+\.py", svg) if not (ROOT / name).exists()]


def test_reading_order_has_no_step_back():
    """Whatever a file imports was read before, or its row says that it comes further down."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### Reading order")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if re.match(r"\| \d", line)]
    files = [re.search(r"`(\w+)", row[1])[1] for row in rows]
    below = [set(re.findall(r"\w+", row[3])) for row in rows]
    folders = {"baselines", "evaluation", "experiments", "miniature"}
    assert set(files) | HELPERS == {path.stem for path in ROOT.glob("*.py")} | folders
    for i, name in enumerate(files):
        assert below[i] <= set(files[i + 1 :]), name
        assert i == 0 or name in set.union(*below[:i]) or not (ROOT / f"{name}.py").exists() or starts(name), name
        if name in files[i + 1 :] or not (ROOT / f"{name}.py").exists():  # read to its end in a later row; a folder
            continue
        used = {module.split(".")[0] for module in imports(ROOT / f"{name}.py")} & {*files, *HELPERS}
        assert used <= HELPERS | set(files[:i]) | below[i], f"{name} uses {used - HELPERS - set(files[:i]) - below[i]}"


def test_nothing_that_is_read_is_executed():
    """As README's Security says: each pickle is read with weights_only, and no text becomes code."""
    paths = [path for folder in (".", *PACKAGES) for path in ROOT.glob(f"{folder}/*.py")]
    loads = []
    for path in paths:
        assert not {"pickle", "marshal", "dill", "yaml"} & {module.split(".")[0] for module in imports(path)}, path
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call):
                name, options = ast.unparse(call.func), {o.arg: ast.unparse(o.value) for o in call.keywords}
                assert name not in ("eval", "exec", "compile", "os.system"), f"{path}:{call.lineno}"
                assert "trust_remote_code" not in options and options.get("allow_pickle", "False") == "False", path
                assert name != "torch.load" or options.get("weights_only") == "True", f"{path}:{call.lineno}"
                loads += [path.relative_to(ROOT).as_posix()] * (name == "torch.load")
    assert sorted(loads) == ["evaluation/scorers.py", "miniature/pretrain.py", "published/convert.py"]


def starts(name):
    """Whether the file is a command, with which one may begin."""
    return "__main__" in (ROOT / f"{name}.py").read_text(encoding="utf-8")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
