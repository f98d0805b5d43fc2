"""What every training script needs around its own model, losses and loop; train_uas.py shows its use.

The run's folder holds log.jsonl, losses.png and samples.png (log.py), and checkpoints (checkpoint.py). With several
processes, as torchrun starts them, a run is data-parallel: each has a GPU and its own samples, all make the same step.

    rank 0   samples 0..B-1    -> losses -> gradients --+
                                                        +-- mean, (trained parameters + 1,) -> the same step in both
    rank 1   samples B..2B-1   -> losses -> gradients --+

Each process reads all frozen weights and steps its own copy of the trained parameters; the copies stay equal. A step
sends one tensor from GPU to GPU, the gradients of the trained parameters in one flat buffer (DistributedDataParallel
would send pieces during the backward pass). The hosts exchange single numbers beside it.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import can_compile
from common.files import lock_folder
from common.images import preprocess_output
from published.loading import checkpoint_folders, load_trained, save_trained
from published.parts import picture_size
from tars.batches import Batches, PairData, TarData
from tars.datasets import pack_sources
from tars.index import expand
from tars.precomputed import Precomputed, find_precomputed
from trainer.checkpoint import Optimizers, load_checkpoint, save_checkpoint, set_aside
from trainer.compiled import count_graphs
from trainer.log import append_log, cut_log, open_board, paint_samples, plot_losses, read_log
from trainer.processes import resume_command, stop_signals

FILES = r"step-\d{8}(\.old)?|log\.jsonl|(losses|samples)\.png|\w+(-\d+)+\.tar(\.index\.npz)?"  # what a run writes
LossesOf = Callable[[dict, list[torch.Generator]], dict[str, Tensor]]  # a batch, a generator for each sample -> losses
NOISE, DROPOUT = 0, 1  # purposes of random streams


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up over `warmup` steps, then linearly to 0 at step `total`. Step 0 is the first."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def total_steps(args: argparse.Namespace, samples: int, ranks: int) -> int:
    if args.steps is not None:
        return args.steps
    return max(1, round(args.epochs * samples / (ranks * args.batch_size * args.accumulate)))


def step_generator(seed: int, step: int, index: int, purpose: int = NOISE) -> torch.Generator:
    """The generator of one sample or batch of a step."""
    entropy = np.random.SeedSequence([seed, step, index, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy) >> 1)


class World:
    """This process as one of `size`, as torchrun's environment says, or alone. Only rank 0 prints and writes."""

    def __init__(self, device: torch.device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(hours=2)  # rank 0 may take long to index many tars
        self.exchange(partial(dist.init_process_group, backend, timeout=timeout))
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, until the process ends

    def exchange(self, call: Callable, *args) -> None:
        """A collective call, if there are several ranks. ValueError of one line where another process has ended."""
        try:
            if self.size > 1:
                call(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo raises it; NCCL does not return, and torchrun ends the process
            raise ValueError(f"the other processes of the run do not answer ({str(error).splitlines()[0]})") from None

    def gather(self, value: object) -> list:
        """Every rank's small value, in all ranks. It goes from host to host and waits for no GPU."""
        values = [value] * self.size
        self.exchange(dist.all_gather_object, values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any rank: from host to host like `gather`, but quick enough for every step."""
        votes = torch.tensor(int(flag))
        self.exchange(dist.all_reduce, votes)
        return bool(votes)

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Rank 0 runs the block before all others, which then find the files that it wrote."""
        if self.rank > 0:
            self.any(True)  # a barrier
        yield
        if self.rank == 0:
            self.any(True)


class Gradients:
    """The gradients of `parameters` in one flat buffer, with the loss at its end; each `.grad` is a view of it. A
    parameter that a step does not reach has gradient 0.

    Where something is not finite, the optimisers step with `found_inf` 1, which makes them leave everything unchanged.
    The host looks at that number only when a line of the log is due, so it does not wait for the GPU in each step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizers: Optimizers, world: World):
        parameters = list(parameters)
        self.optimizers, self.world = optimizers, world
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = torch.zeros(sum(sizes) + 1, device=parameters[0].device)
        for parameter, part in zip(parameters, self.flat[:-1].split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.skipped, self.in_a_row, self.longest = torch.zeros(3, device=self.flat.device)  # counts of skipped steps

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.flat[-1] += loss.detach()

    def step(self) -> None:
        """One step of the optimisers along the mean over the ranks, or none."""
        if self.world.size > 1:
            self.flat /= self.world.size
        self.world.exchange(dist.all_reduce, self.flat)
        # The norm is infinite even if only a gradient's square overflows: AdamW's second moment would never recover.
        finite = torch.linalg.vector_norm(self.flat).isfinite()
        found_inf = 1.0 - finite.float()
        self.flat.masked_fill_(~finite, 0.0)
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf
            optimizer.step()
        self.flat.zero_()
        self.skipped = self.skipped + found_inf
        self.in_a_row = (self.in_a_row + 1) * found_inf
        self.longest = torch.maximum(self.longest, self.in_a_row)


class Meter:
    """Sums of the losses since the last line of the log. Losses that are not finite are left out. No value is read from
    the GPU before a line is due. before: what `state` returned before a stop."""

    def __init__(self, before: dict | None = None):
        kinds = ((before or {}).get(kind, {}) for kind in ("sums", "passes"))
        self.sums, self.passes = ({name: torch.tensor(value) for name, value in kind.items()} for kind in kinds)
        self.steps, self.start = 0, time.perf_counter()

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """The losses of one forward pass; a batch without pictures has fewer of them."""
        for name, value in losses.items():
            finite = value.detach().isfinite()
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().where(finite, 0.0)
            self.passes[name] = self.passes.get(name, 0) + finite

    def state(self) -> dict:
        """What this rank has added since the last line."""
        values = {"sums": self.sums, "passes": self.passes}
        return {kind: {name: value.item() for name, value in own.items()} for kind, own in values.items()}

    def steps_per_second(self) -> float:
        return self.steps / max(time.perf_counter() - self.start, 1e-9)  # a clock may stand still


class Run:
    """One training from its first to its last step, over several processes and several starts of the command.

    save_trained(model, trained, path, stage) and load_trained(model, path) write and read the tensors of
    `model.trained_parameters()`. `preview`: the `Preview` for samples.png; the script sets it, if it wants one.
    """

    def __init__(self, args: argparse.Namespace, name: str, save_trained=save_trained, load_trained=load_trained):
        self.args, self.name, self.save_trained, self.load_trained = args, name, save_trained, load_trained
        self.arguments = json.loads(json.dumps(vars(args), default=str))  # as state.json holds them
        self.device, self.size = args.device, picture_size(args.weights)  # side of the pictures that it paints
        torch.set_float32_matmul_precision("high")  # float32 products of trained parts may use TF32
        torch.manual_seed(args.seed)
        self.world = World(self.device)
        self.compiled = can_compile(self.device) if args.compile is None else args.compile
        options = {name: getattr(args, name) for name in ("batch_size", "seed", "workers", "max_bad")}
        self.data_options = options | {"rank": self.world.rank, "world_size": self.world.size}  # those of `Batches`
        self.preview = None
        self.out = args.out
        self.log = self.out / "log.jsonl"
        if self.world.rank == 0:
            self.lock = lock_folder(self.out, FILES)
        if checkpoint_folders(self.out) and not args.resume:
            raise ValueError(f"{self.out} holds a run already: --resume continues it, another --out starts anew")

    def find_tars(self, kind: str, write: Callable) -> tuple[list[str], list[str], Precomputed]:
        """The tars of --data, or else of `draw_data`, those of --val, and what all of them have precomputed. kind:
        "pairs" or "turns"; write: the writer of drawn data, in miniature.world. Rank 0 packs and draws before the other
        ranks, which then find its files."""
        with self.world.rank_0_first():
            pack = partial(pack_sources, kind, again=self.world.rank == 0 and not self.args.resume)
            tars = expand(pack(self.args.data, self.out / "data") or self.draw_data(kind, write))
            held_out = expand(pack(self.args.val, self.out / "val"))
        return tars, held_out, find_precomputed(tars + held_out, self.args.weights)

    def draw_data(self, kind: str, write: Callable[..., None]) -> list[str]:
        """A tar of the miniature's world in the run's folder, which is drawn unless it is there already."""
        path = self.out / f"drawn_{kind}-{self.args.drawn}-{self.args.seed}.tar"
        if not path.exists():
            print(f"drawing {self.args.drawn:,} samples into {path}", flush=True)
            write(path, self.args.drawn, self.args.seed, size=self.size)
        return [str(path)]

    def open_tars(self, dataset: Callable[[list[str]], TarData], *tars: list[str]) -> list[Batches | None]:
        """Batches of each list of tars, None of an empty one. Rank 0 writes their indices for the other ranks."""
        with self.world.rank_0_first():
            return [Batches(dataset(part), **self.data_options) if part else None for part in tars]

    def open_pairs(self, write: Callable[..., None]) -> list[Batches | None]:
        """Batches of the captioned pictures of --data, or of drawn ones that `write` writes, and of those of --val."""
        *tars, precomputed = self.find_tars("pairs", write)
        transform = partial(preprocess_output, size=self.size)
        return self.open_tars(partial(PairData, transform=transform, precomputed=precomputed), *tars)

    # ---- the loop

    def steps(
        self, model: nn.Module, optimizers: Optimizers, data: Batches, held_out: Batches | None, losses_of: LossesOf
    ) -> Iterator[int]:
        """The numbers of the steps, from 0, or with --resume from the one after the newest checkpoint. Before each the
        learning rates are set. After each comes what is due: a line of the log, pictures, a checkpoint, held-out
        losses. Ends early after a signal to stop. An error in the loop's body closes this generator, too, which ends
        the processes that read the data. `losses_of`: its "loss" is the one to be minimised."""
        self.model, self.optimizers, self.data, self.held_out = model, optimizers, data, held_out
        self.losses_of = losses_of
        self.begin()
        args = self.args
        options = {"unit": "step", "initial": self.done, "dynamic_ncols": True, "disable": self.world.rank > 0}
        bar = tqdm(range(self.done, self.total), self.name, self.total, **options)
        with stop_signals() as stop_requests, closing(self.data), bar:
            for step in bar:
                for group, rate in self.rates:
                    group["lr"] = rate * learning_rate_factor(step, args.warmup, self.total)
                yield step
                self.done, is_last = step + 1, step + 1 == self.total
                stopping = self.world.any(bool(stop_requests))
                if is_last or self.done % args.log_every == 0:
                    self.write_log(bar)
                    self.stop_if_nonfinite()
                if args.sample_every and self.done % args.sample_every == 0 and self.world.rank == 0:
                    plot_losses(read_log(self.log), self.out / "losses.png")
                    if self.preview:
                        paint_samples(model, self.preview, args.weights, self.out / "samples.png")
                if is_last or stopping or self.done % args.save_every == 0:
                    self.save()
                if self.held_out and (is_last or self.done % args.val_every == 0):
                    self.validate(bar, [] if is_last else stop_requests)  # the last losses come even after a stop
                if stopping:
                    break
        if self.world.size > 1:  # after the last exchange, but not after an error: NCCL would wait for the others
            dist.destroy_process_group()
        if self.done < self.total:
            print(f"stopped after step {self.done} of {self.total}; to go on: {resume_command()}")
        else:
            print(f"done: {self.done} steps, {sum(self.bad.values()):,} broken samples, see {self.out}")

    def begin(self) -> None:
        """Get ready for the first step, or with --resume for the one after the newest checkpoint."""
        self.total = total_steps(self.args, self.data.size, self.world.size)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.rates = [(group, group["lr"]) for group in groups]
        self.gradients = Gradients((p for group in groups for p in group["params"]), self.optimizers, self.world)
        if self.world.size > 1:
            size = f"{self.gradients.flat.nbytes:,} bytes"
            print(f"{self.world.size} processes; each step sends {size}: gradients and loss")
        self.meter, self.bad, self.trained = Meter(), {}, self.model.trained_parameters()
        load_trained = partial(self.load_trained, self.model)
        state = load_checkpoint(self.out, self.trained, self.optimizers, load_trained) if self.args.resume else None
        self.done = state["step"] if state else 0
        if len(set(self.world.gather(self.done))) > 1:
            raise ValueError("the ranks find different checkpoints: --out must be one folder that all machines share")
        if state:
            self.data.load_state_dict(state["data"])
            self.bad = dict(self.data.bad)
            self.gradients.skipped += state.get("nonfinite", 0)
            if self.world.rank == 0:
                self.meter = Meter(state["data"])
                cut_log(self.log, self.done)
                set_aside(self.out, self.done)
            print(f"resumed from step {self.done}")
            before = state.get("arguments", {})
            for name, value in self.arguments.items():
                if name not in ("out", "resume") and before.get(name, value) != value:
                    print(f"--{name.replace('_', '-')} is {value} from here on, before it was {before[name]}")
        elif self.world.rank == 0:
            self.log.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        if self.world.rank == 0:
            self.board = open_board(self.out, self.done) if self.args.tensorboard else None

    def batches(self, step: int) -> Iterator[tuple[dict, list[torch.Generator]]]:
        """This rank's batches of a step, and a random generator for each sample."""
        for forward_pass in range(self.args.accumulate):
            yield next(self.data), self.seed_batch(step, forward_pass * self.world.size + self.world.rank)

    def seed_batch(self, step: int, batch: int) -> list[torch.Generator]:
        """Seed dropout, and return a generator for each sample of a batch, by the seed and the place in the run alone.
        batch: its number among the batches of all forward passes and ranks of the step."""
        seed, size = self.args.seed, self.args.batch_size
        torch.manual_seed(step_generator(seed, step, batch, DROPOUT).initial_seed())
        return [step_generator(seed, step, index) for index in range(batch * size, (batch + 1) * size)]

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of one forward pass to those of the step."""
        self.gradients.backward(losses["loss"] / self.args.accumulate)
        self.meter.add(losses)

    def optimizer_step(self) -> None:
        """The optimisers' step along the mean of all ranks' gradients; none where something is not finite."""
        self.gradients.step()
        self.meter.steps += 1

    # ---- after a step

    def means(self, meter: Meter) -> dict[str, float]:
        """The means over all ranks of the losses that were finite at least once."""
        total = self.add_up(**meter.state())
        return {name: value / total["passes"][name] for name, value in total["sums"].items() if total["passes"][name]}

    def add_up(self, **counts: dict) -> dict[str, dict]:
        """Counts of this rank by kind and name -> those of all ranks, added up."""
        totals = {kind: Counter() for kind in counts}
        for rank in self.world.gather(counts):
            for kind, total in totals.items():
                total.update(rank[kind])
        return {kind: dict(total) for kind, total in totals.items()}

    def write_log(self, bar: tqdm) -> None:
        self.bad = self.add_up(bad=dict(self.data.bad))["bad"]
        losses, samples_per_step = self.means(self.meter), self.world.size * self.args.batch_size * self.args.accumulate
        record = {"step": self.done, **losses, "lr": self.optimizers[0].param_groups[-1]["lr"]}
        record |= {"samples_per_s": round(samples_per_step * self.meter.steps_per_second(), 3), "bad": self.bad}
        self.meter = Meter()
        record |= {"nonfinite": int(self.gradients.skipped)} | ({"graphs": count_graphs()} if self.compiled else {})
        if self.device.type == "cuda":
            record["memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
        if self.world.rank == 0:
            append_log(self.log, record, self.board)
        bar.set_postfix({name: f"{record[name]:.4g}" for name in (*losses, "samples_per_s")})

    def stop_if_nonfinite(self) -> None:
        """ValueError where too many steps in a row were skipped, which all ranks know. Checked with each log line."""
        longest, limit = int(self.gradients.longest), self.args.max_nonfinite
        if longest < limit:
            return
        if self.world.rank > 0:
            sys.exit(2)  # rank 0 says why
        saved = ", ".join(folder.name for folder in checkpoint_folders(self.out)) or "none"
        what = f"loss or gradients of {longest} steps in a row up to step {self.done} were not finite"
        raise ValueError(f"{what}, --max-nonfinite is {limit}; checkpoints in {self.out}: {saved}")

    def save(self) -> None:
        """A checkpoint of the last step. All ranks take part, as each knows its own sums; rank 0 writes it."""
        data = {**self.data.state_dict(), **self.add_up(bad=dict(self.data.bad), **self.meter.state())}
        data["seen"] = sum(self.world.gather(self.data.seen))
        state = {"step": self.done, "data": data, "nonfinite": int(self.gradients.skipped), "arguments": self.arguments}
        if self.world.rank == 0:
            save_trained = partial(self.save_trained, self.model, self.trained, stage=self.name)
            save_checkpoint(self.out, state, self.trained, self.optimizers, save_trained)

    def validate(self, bar: tqdm, stop_requests: list) -> None:
        """Log the held-out losses: means over the first batches of each rank, of one pass at most, with the same random
        numbers each time. The first of the `stop_requests` ends them without a line in the log."""
        args, held_out, meter = self.args, self.held_out, Meter()
        start, was_training = held_out.state_dict(), self.model.training
        one_pass = -(-held_out.size // (args.batch_size * self.world.size))
        self.model.eval()
        # Gradients stay on where the losses are compiled: without them torch would compile other graphs.
        with closing(held_out), torch.set_grad_enabled(self.compiled):
            for n in range(min(args.val_batches, one_pass)):
                meter.add(self.losses_of(next(held_out), self.seed_batch(n, self.world.rank)))
                if stopping := self.world.any(bool(stop_requests)):
                    break
        self.model.train(was_training)
        held_out.load_state_dict(start)
        record = {} if stopping else {f"val_{name}": value for name, value in self.means(meter).items()}
        if record and self.world.rank == 0:
            append_log(self.log, {"step": self.done, **record}, self.board)
            bar.write(f"step {self.done}: " + ", ".join(f"{name} {value:.5g}" for name, value in record.items()))
