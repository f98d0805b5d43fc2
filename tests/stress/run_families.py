"""A run's moments, states and log, folders of answers, and options: what fuzz.py feeds to their readers. See
data_families.py."""

import json
from functools import partial
from pathlib import Path
from random import Random
from unittest import mock

import safetensors.torch
import torch
from bad_files import BAD_SAFETENSORS, BAD_TEXTS, RAW, VALUES, cut
from data_families import require
from helpers import DATA
from PIL import Image

import sample
import train_mls
import train_uas
from evaluation.cases import check_settings, read_answer, write_answer
from generation import Sampling
from published.loading import matching_tensors, save_safetensors
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.log import cut_log, plot_losses, read_log
from trainer.muon import Muon
from trainer.run import total_steps

# ---- moments and state.json of a checkpoint

CHANGES = (
    "scalar",
    "longer",
    "shorter",
    "turned",
    "half",
    "whole numbers",
    "missing",
    "all missing",
    "not finite",
)
BAD_STATES = ("state: value", "state: value in data", "state: missing", "state: cut")


def open_tiny() -> tuple[dict, list]:
    """Two trained tensors, of an optimiser each."""
    generator = torch.Generator().manual_seed(0)
    trained = {"matrix": torch.nn.Parameter(torch.randn(3, 4, generator=generator))}
    trained["bias"] = torch.nn.Parameter(torch.zeros(3))
    return trained, [torch.optim.AdamW([trained["bias"]], fused=True), Muon([trained["matrix"]], 0.1)]


def step(trained: dict, optimizers: list) -> None:
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def read_trained(trained: dict, path: Path) -> None:
    for name, tensor in matching_tensors(trained, [path]).items():
        trained[name].copy_(tensor)


def read_bad_moments(what: str, rng: Random, folder: Path) -> str:
    """The newest of two checkpoints is bad: the older one is taken, or a bad one where nothing in it can be noticed."""
    trained, optimizers = open_tiny()
    for number in (1, 2):
        step(trained, optimizers)
        state = {"step": number, "nonfinite": 0, "arguments": {"lr": 1.0}, "data": DATA | {"sums": {"loss": 2.5}}}
        saved = save_checkpoint(folder, state, trained, optimizers, partial(save_safetensors, trained))
    if what.startswith("state"):
        path = saved / "state.json"
        path.write_bytes(bad_state(what, rng, json.loads(path.read_text(encoding="utf-8"))))
    else:
        path = saved / "optimizer.safetensors"
        path.write_bytes(BAD_SAFETENSORS[what](rng, path.read_bytes()) if what in BAD_SAFETENSORS else b"")
        if what in CHANGES:
            path.write_bytes(changed_moments(what, rng, saved.parent))
    trained, optimizers = open_tiny()
    state = load_checkpoint(folder, trained, optimizers, partial(read_trained, trained))
    require(state["step"] == 1 or what not in CHANGES, "moments that do not fit were taken")
    require(all(type(state["data"][name]) is int for name in ("epoch", "position", "seen")), f"{state}")
    for parameter, own in ((p, own) for optimizer in optimizers for p, own in optimizer.state.items()):
        for kind, tensor in own.items():
            shape = () if kind == "step" else parameter.shape
            require(tensor.shape == shape and tensor.dtype == torch.float32, f"{kind} is {tensor.dtype} {tensor.shape}")
    require(sum(len(optimizer.state) for optimizer in optimizers) == 2, "moments start from zero")
    step(trained, optimizers)  # a fused one writes where its moments lie
    return "used" if state["step"] == 2 else "skipped"


def changed_moments(what: str, rng: Random, folder: Path) -> bytes:
    tensors = safetensors.torch.load_file(folder / "step-00000001" / "optimizer.safetensors")
    name = rng.choice([name for name in tensors if not name.startswith("step.") or what in ("missing", "half")])
    old = tensors[name]
    new = {
        "scalar": torch.tensor(0.0),
        "longer": torch.ones(1000),
        "shorter": old.flatten()[:1].clone(),
        "turned": old[None].transpose(0, -1).contiguous(),
        "half": old.half(),
        "whole numbers": old.int(),
        "not finite": old * float("nan"),
    }
    tensors[name] = new.get(what, old)
    kept = {} if what == "all missing" else {n: t for n, t in tensors.items() if what != "missing" or n != name}
    return safetensors.torch.save(kept)


def bad_state(what: str, rng: Random, state: dict) -> bytes:
    place = state["data"] if what.endswith("data") or rng.random() < 0.5 else state
    name = rng.choice(list(place))
    if what == "state: missing":
        del place[name]
    elif what != "state: cut":
        place[name] = rng.choice(VALUES)
        if rng.random() < 0.3:
            place[name] = "RAW"
            return json.dumps(state).replace('"RAW"', rng.choice(RAW)).encode()
    content = json.dumps(state).encode()
    return cut(rng, content) if what == "state: cut" else content


# ---- log.jsonl

BAD_LOGS = ("nothing", "cut", "other lines", "no lines")


def read_bad_log(what: str, rng: Random, folder: Path) -> str:
    lines = [json.dumps({"step": i, "loss": 1 / i, "val_loss": 2.0, "bad": {}, "lr": 0.1}) for i in range(1, 9)]
    for _ in range(rng.choice((1, 3))):
        if what == "other lines":
            lines[rng.randrange(len(lines))] = rng.choice(("[" * 9999, "\x00", '{"step": 3, "lo', "loss"))
    content = "\n".join([] if what == "no lines" else [*lines, ""]).encode("utf-8", "surrogatepass")
    path = folder / "log.jsonl"
    path.write_bytes(cut(rng, content) if what == "cut" else content)
    records = read_log(path)
    plot_losses(records, folder / "losses.png")
    cut_log(path, 4)
    require(all(record["step"] <= 4 for record in read_log(path)), "lines after the last step")
    require(what != "nothing" or len(records) == 8, "good lines are left out")
    return "used" if len(records) == 8 else "skipped"


# ---- folders of answers

BAD_ANSWERS = (*(f"words: {name}" for name in BAD_TEXTS), "value", "segment", "picture", "cut", "settings", "key")


def read_bad_answer(what: str, rng: Random, folder: Path) -> str:
    key = "".join(chr(rng.choice((46, 47, 65, 0x4E00, 0x1F600))) for _ in range(60)) if what == "key" else "0"
    write_answer(folder, key, ["words", Image.new("RGB", (4, 4))])
    path = next(folder.glob("*.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    if what == "settings":
        (folder / "_answers.json").write_text(json.dumps(rng.choice((content, *VALUES))), encoding="utf-8")
        check_settings(folder, {"segments": content["segments"], "seed": rng.choice((0, None))})
    elif what.startswith("words: "):
        made = BAD_TEXTS[what.removeprefix("words: ")](rng)
        content["segments"][0]["text"] = made if isinstance(made, str) else made.decode("utf-8", "surrogateescape")
    elif what == "value":
        content[rng.choice(("segments", "unusable"))] = rng.choice(VALUES)
    elif what == "segment":
        content["segments"][0] = rng.choice((*VALUES, {"text": 5}, {"image": None}, {"text": None, "image": "x"}))
    elif what == "picture":
        odd = ("", ".", "..", "/etc/passwd", "a\0b", "x" * 5000, "\ud800.png", "/dev/zero", "0.json")
        content["segments"][1]["image"] = rng.choice(odd)
    path.write_bytes(cut(rng, path.read_bytes()) if what == "cut" else json.dumps(content).encode())
    found = read_answer(folder, key)
    for segment in found.segments:
        require(isinstance(segment, str | Image.Image), f"{segment!r:.80}")
        require(not isinstance(segment, str) or segment.encode(), "words that cannot be written")
    require(what != "key" or len(found.segments) == 2, "another answer than was written")
    return "skipped" if found.unusable else "used"


# ---- options

SCRIPTS = {"train_uas": train_uas, "train_mls": train_mls, "sample": sample}
NUMBERS = ("0", "-1", "1", "1e300", "-1e300", "1e31", "1e29", "nan", "inf", "1e-320", "10" * 20, "2147483648", "0x10")
NUMBERS += ("1_000", "٣", "", " ", "image", "[IMG0]", "\udcff", "x" * 1000, "--", "0.5")
OPTIONS = ("lr", "mapper-lr", "muon", "min-snr-gamma", "epochs", "steps", "batch-size", "accumulate", "warmup", "drawn")
OPTIONS += ("workers", "max-bad", "max-nonfinite", "save-every", "sample-every", "val-every", "val-batches", "seed")
OPTIONS += ("log-every", "vokens", "start-as", "lora-rank", "tasks", "blind-history", "text-weight", "adapter-lr")
OPTIONS += ("dtype", "max-tokens", "guidance", "temperature", "top-p", "turns", "max-new-tokens", "threads")


def read_bad_options(what: str, rng: Random, folder: Path) -> str:
    """`what` takes one of its options to an extreme, or two."""
    given = ["--prompt", "x"] if what == "sample" else []
    for _ in range(rng.choice((1, 1, 2))):
        given += [f"--{rng.choice(OPTIONS)}={rng.choice(NUMBERS)}"]
    try:
        with mock.patch("sys.argv", [what, "--out", str(folder), *given]), mock.patch("sys.stderr", mock.Mock()):
            args = SCRIPTS[what].arguments()
            sampling = Sampling.of(vars(args)) if what == "sample" else None
    except (SystemExit, ValueError) as error:  # argparse or the script says what is wrong
        require("\n" not in str(error), f"{error}")
        return "skipped"
    numbers = [value for value in vars(args).values() if isinstance(value, int | float)]
    require(all(abs(value) < 1 << 63 or abs(value) <= 1e30 for value in numbers), f"{given}")
    require(torch.tensor([float(value) for value in numbers]).isfinite().all(), f"{given}")
    require(sampling or 1 <= total_steps(args, 100, 1) < 10**40, f"{given}")
    require(not hasattr(args, "lora_rank") or args.lora_rank <= 1024, f"{given}")
    return "used"


RUN_FAMILIES = {
    "moments": ((*CHANGES, *BAD_SAFETENSORS, *BAD_STATES), read_bad_moments),
    "logs": (BAD_LOGS, read_bad_log),
    "answers": (BAD_ANSWERS, read_bad_answer),
    "options": (tuple(SCRIPTS), read_bad_options),
}
