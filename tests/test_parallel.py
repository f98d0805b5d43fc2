"""Several processes against one: the same losses and weights, every sample once, one stop for all, and what they send.

The ranks of a run are forked from one process without a GPU, each in the environment that torchrun would give it.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import pairs, write_tar
from random_weights import write_random_weights
from safetensors.torch import load_file

import train_mls
import train_uas
from baselines import train_sd
from baselines.stable_diffusion import StableDiffusion
from common.cli import run
from miniature.world import write_stories
from minigpt5 import MiniGPT5
from published.loading import checkpoint_folders
from tars.batches import Batches, PairData
from trainer.log import read_log

ROOT = Path(__file__).resolve().parents[1]
ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
SCRIPTS = {"uas": train_uas, "mls": train_mls, "sd": train_sd}
FIXED = ["--warmup", 5, "--lr", 1e-3, "--log-every", 1, "--sample-every", 0, "--workers", 0, "--steps", 4]


# ---- the ranks


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_rank(script, out: Path, arguments: list, stop_after: int = 0, spoiled: int = -1) -> None:
    """One rank, which writes down its samples and the sizes of what it sends. The last rank is asked to stop after
    `stop_after` steps, and its losses are NaN in step `spoiled`."""
    torch.set_num_threads(1)
    keys, sent, steps = [], [], iter(range(1000))
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", 1)) - 1)
    read, reduce, losses_of = Batches.__next__, dist.all_reduce, MiniGPT5.losses

    def next_batch(batches):
        batch = read(batches)
        keys.append(batch["keys"])
        return batch

    def all_reduce(tensor):
        sent.append(tensor.nbytes)
        reduce(tensor)

    def losses(model, *inputs, **options):
        step = next(steps)
        if last and step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        values = losses_of(model, *inputs, **options)
        return {n: v * float("nan") for n, v in values.items()} if last and step == spoiled else values

    Batches.__next__, dist.all_reduce, MiniGPT5.losses = next_batch, all_reduce, losses
    sys.argv = [f"{script.__name__}.py", "--out", str(out), *map(str, arguments)]
    script.main()
    rank = os.environ.get("RANK", 0)
    note = out / f"rank-{rank}-{len(list(out.glob(f'rank-{rank}-*')))}.json"
    note.write_text(json.dumps({"keys": keys, "sent": sent}))


def run_ranks(stage: str, ranks: int, out: str, *job) -> list[int]:
    """Fork them; their exit statuses."""
    where = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] > 0:
            continue
        os.environ |= {n: str(v) for n, v in (where | {"RANK": rank, "LOCAL_RANK": rank}).items()} if ranks > 1 else {}
        with open(f"{out}/printed-{rank}", "a") as printed:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        try:
            run(lambda: run_rank(SCRIPTS[stage], Path(out), *job))
        except SystemExit as error:
            os._exit(error.code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs of this file, made in one go."""
    folder = tmp_path_factory.mktemp("ranks")
    weights = write_random_weights(folder / "weights", small=True)
    pairs_tar, stories = write_tar(folder / "pairs.tar", pairs(8)), folder / "stories.tar"
    write_stories(stories, 3, 0, "train")
    uas = ["--weights", weights, "--data", pairs_tar, *FIXED]
    mls = ["--weights", weights, "--data", stories, *FIXED]
    texts = ["--batch-size", 1, "--seed", 253]  # pictures in steps 2, 3 and 4: in no rank, in both, in rank 1 alone
    jobs = [
        ("uas", 1, "one", [*uas, "--batch-size", 4, "--val", pairs_tar]),
        ("uas", 2, "two", [*uas, "--batch-size", 2]),
        ("uas", 2, "two-val", [*uas, "--batch-size", 2, "--val", pairs_tar, "--sample-every", 3]),
        ("uas", 2, "two-one-two", [*uas, "--batch-size", 2], 1),
        ("uas", 1, "two-one-two", [*uas, "--batch-size", 4, "--resume"], 1),
        ("uas", 2, "two-one-two", [*uas, "--batch-size", 2, "--resume"]),
        ("uas", 1, "one-two", [*uas, "--batch-size", 4], 3),
        ("uas", 2, "one-two", [*uas, "--batch-size", 2, "--resume"]),
        ("uas", 2, "spoiled", [*uas, "--batch-size", 2, "--save-every", 1], 2, 1),
        ("mls", 1, "mls-one", [*mls, "--batch-size", 2, "--accumulate", 2]),
        ("mls", 2, "mls-two", [*mls, "--batch-size", 2]),
        ("mls", 2, "lora", [*mls, *texts, "--val", stories, "--sample-every", 3]),
        ("mls", 2, "prefix", [*mls, *texts, "--prefix", "--gradient-checkpointing"]),
    ]
    return make_runs(folder, jobs)


def make_runs(folder: Path, jobs: list[tuple]) -> Path:
    """Runs of the jobs in `folder`, one after the other; returns it."""
    jobs = [(stage, ranks, str(folder / out), list(map(str, a)), *more) for stage, ranks, out, a, *more in jobs]
    for job in jobs:
        Path(job[2]).mkdir(exist_ok=True)
    environment = ALONE | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    code = "import json, sys, test_parallel; print([test_parallel.run_ranks(*job) for job in json.loads(sys.argv[1])])"
    command = [sys.executable, "-c", code, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=900)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout.splitlines()[-1])
    assert all(set(status) == {0} for status in statuses), (statuses, done.stderr)
    return folder


def compare(folder, one: str, other: str) -> None:
    """Largest relative difference of any loss, and that of the weights in the end: in all, as AdamW makes steps of one
    size out of gradients that are nothing but rounding."""
    logs = [[r for r in read_log(folder / name / "log.jsonl") if "loss" in r] for name in (one, other)]
    assert [record["step"] for record in logs[0]] == [record["step"] for record in logs[1]] == [1, 2, 3, 4]
    names = ("loss", "text_loss", "ldm_loss", "cap_loss")
    assert all([name in a for name in names] == [name in b for name in names] for a, b in zip(*logs, strict=True))
    worst = max(abs(a[name] / b[name] - 1) for a, b in zip(*logs, strict=True) for name in names if name in a)
    ours, theirs = (load_file(checkpoint_folders(folder / n)[0] / "trained.safetensors") for n in (one, other))
    ours, theirs = (torch.cat([w[name].flatten() for name in sorted(theirs)]) for w in (ours, theirs))
    weights = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"{one} against {other}: losses differ by {worst:.1e} of themselves, weights by {weights:.1e}")
    assert worst <= 1e-6 and weights <= 1e-5


def keys(folder, run: str) -> list[str]:
    """All samples of a run by its ranks, process after process."""
    return [k for f in sorted((folder / run).glob("rank-*")) for b in json.loads(f.read_text())["keys"] for k in b]


# ---- tests


@pytest.mark.parametrize("other", ["two", "two-one-two", "one-two"])
def test_uas_on_two_ranks_is_that_on_one(folder, other):
    """From beginning to end, and resumed on another number of ranks after each stop, in the middle of an epoch."""
    compare(folder, other, "one")
    counts = Counter(keys(folder, other))
    assert len(counts) == 8 and set(counts.values()) == {2}  # two epochs


def test_two_machines(folder):
    """The line of docs/training.md for them, in two torchruns that meet at a port of this one."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    line = re.search(r"the same line on both\ntorchrun (--nnodes 2 .*?)\n```", page, re.DOTALL)[1]
    ours = {"8": 1, "3": 2, "weights": folder / "weights", "cc3m-train-*.tar": folder / "pairs.tar"}
    ours["HOST:29500"] = f"localhost:{free_port()}"
    words = [str(ours.pop(word, word)) for word in shlex.split(line.replace("\\\n", ""))]
    assert not ours
    words += map(str, [*FIXED, "--out", folder / "machines"])
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    options = {"cwd": ROOT, "env": os.environ | ALONE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    machines = [subprocess.Popen(command, text=True, **options) for _ in range(2)]
    printed = [machine.communicate(timeout=900) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert sorted("done: 4 steps" in out for out, _ in printed) == [False, True]
    compare(folder, "machines", "one")


def test_mls_on_two_ranks_is_that_of_two_forward_passes(folder):
    """With LoRA's dropout and texts without pictures; means over tokens and over pictures are a forward pass's own."""
    compare(folder, "mls-two", "mls-one")
    assert Counter(keys(folder, "mls-two")) == Counter(keys(folder, "mls-one"))


def test_fine_tuned_sd_on_two_ranks_with_less_memory(tmp_path):
    """Two processes that compute the UNet twice make the steps of one that accumulates."""
    weights, stories = write_random_weights(tmp_path / "weights", small=True), tmp_path / "stories.tar"
    write_stories(stories, 3, 0, "train")
    sd = ["--weights", weights, "--data", stories, *FIXED, "--batch-size", 2]
    jobs = [("sd", 1, "one", [*sd, "--accumulate", 2]), ("sd", 2, "two", [*sd, "--gradient-checkpointing"])]
    compare(make_runs(tmp_path, jobs), "two", "one")
    assert Counter(keys(tmp_path, "two")) == Counter(keys(tmp_path, "one"))
    counts = [json.loads(file.read_text())["sent"] for file in sorted((tmp_path / "two").glob("rank-*"))]
    parameters = sum(p.numel() for p in StableDiffusion(weights).unet.parameters())
    assert (
        counts[0] == counts[1] and counts[0].count(4 * (parameters + 1)) == 4
    )  # the gradients and the loss, each step


def test_which_steps_have_pictures(folder):
    logs = [[r for r in read_log(folder / run / "log.jsonl") if "loss" in r] for run in ("lora", "prefix")]
    assert [["ldm_loss" in record for record in log] for log in logs] == [[True, False, True, True]] * 2
    assert (folder / "lora" / "samples.png").exists() and (folder / "two-val" / "samples.png").exists()


def test_held_out_losses_on_two_ranks(folder):
    """Pairs on one rank and on two; stories on two, where a rank may have no picture."""
    logs = [read_log(folder / run / "log.jsonl") for run in ("one", "two-val", "lora")]
    one, two, lora = ([record for record in log if "val_loss" in record] for log in logs)
    assert len(one) == len(two) == len(lora) == 1 and one[0] == pytest.approx(two[0], rel=1e-6)
    assert {"val_loss", "val_ldm_loss"} < one[0].keys() and {"val_loss", "val_ldm_loss"} < lora[0].keys()


@pytest.mark.parametrize("run", ["two", "mls-two", "lora", "prefix"])
def test_only_what_trains_is_sent(folder, run):
    printed = (folder / run / "printed-0").read_text()
    trained = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:parameters|in the mapper)", printed))
    bytes_a_step = int(re.search(r"sends ([\d,]+) bytes", printed)[1].replace(",", ""))
    assert bytes_a_step == 4 * (trained + 1)  # and the loss
    for note in (folder / run).glob("rank-*"):
        sent = Counter(json.loads(note.read_text())["sent"])
        assert sent.pop(bytes_a_step) == 4 and set(sent) == {8}  # and whether a rank was asked to stop
    print(f"{bytes_a_step:,} bytes a step")


def test_one_rank_writes(folder):
    """And prints; the other is silent, though it was the one that was asked to stop."""
    assert (folder / "two-one-two" / "printed-1").read_text() == ""
    printed = (folder / "two-one-two" / "printed-0").read_text()
    assert "stopped after step 1 of 4; to go on: torchrun --nnodes 1 --nproc-per-node 2 train_uas.py" in printed
    written = {"lock", "log.jsonl", "losses.png", "samples.png", "step-00000004"}
    ours = {"printed-0", "printed-1", "rank-0-0.json", "rank-1-0.json"}
    assert {path.name for path in (folder / "two-val").iterdir()} == written | ours


def test_a_step_is_skipped_by_all_or_none(folder):
    """Its loss was not finite on one rank, which was then asked to stop at the end of that same step."""
    one, two = (load_file(path / "trained.safetensors") for path in checkpoint_folders(folder / "spoiled"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    log = read_log(folder / "spoiled" / "log.jsonl")
    assert [record["nonfinite"] for record in log] == [0, 1] and np.isfinite(log[1]["loss"])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_sample_once_an_epoch(folder, ranks, workers):
    data = PairData([str(folder / "pairs.tar")], np.asarray)
    data.collate = lambda samples: {"keys": [sample["key"] for sample in samples]}
    met = Counter()
    for rank in range(ranks):
        batches = Batches(data, 4 // ranks, rank=rank, world_size=ranks, workers=workers)
        met.update(key for _ in range(2) for key in next(batches)["keys"])
        batches.close()
    assert len(met) == 8 and set(met.values()) == {1}
