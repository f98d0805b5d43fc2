"""Every training and scoring of the paper's experiments, as lists: SYSTEMS, SCORINGS, TABLES, PICTURES.

    plan(options, seeds, parts) -> {name: Job}      what `paper.py` runs: data, then trainings, then scorings, each once

A system is a script of this repository with its switches. Trainings and answers differ between seeds, the test data do
not. What the paper trains at full size is here in the miniature's drawn world, which stands in for CC3M (pairs), VIST
(stories) and MMDialog (dialogues); test data are held out: their kind, colour and scene were never trained together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# ---- what is trained


class System(NamedTuple):
    script: str
    data: str  # a training tar (data_jobs)
    share: float  # of the steps of stage 1
    switches: tuple[str, ...] = ()
    start: str | None = None  # the system whose run is stage 1


UAS, MLS = "train_uas.py", "train_mls.py"
# Stage 2 as the paper has it, in the place of the miniature's own settings (config.json of its weights).
AS_PAPER = ("--lora-rank", "8", "--lora-targets", "q_proj,v_proj", "--adapter-lr", "3e-4", "--text-weight", "0.01",
            "--blind-history", "0")  # fmt: skip
TEXT_ONLY = ("--no-uas", "--no-ldm")
SYSTEMS = {
    "uas": System(UAS, "pairs", 1),
    "no-cfg": System(UAS, "pairs", 1, ("--no-cfg",)),
    "no-cap": System(UAS, "pairs", 1, ("--no-cap",)),
    "no-ldm": System(UAS, "pairs", 1, ("--no-ldm",)),
    **{f"vokens-{n}": System(UAS, "pairs", 1, ("--vokens", str(n))) for n in (1, 2, 4, 16)},
    "lora": System(MLS, "stories", 0.5, (), "uas"),
    "prefix": System(MLS, "stories", 0.5, ("--prefix",), "uas"),
    "no-uas": System(MLS, "stories", 0.5, ("--no-uas",)),
    "minigpt4": System(MLS, "stories", 0.5, ("--tasks", "text=1", *TEXT_ONLY)),  # it narrates a picture that is given
    "teller": System(MLS, "stories", 0.5, ("--tasks", "text+image=1", "--words-only", "--no-uas")),  # the next step
    "gill": System("baselines/gill.py", "pairs", 1, ("--lr", "1e-3", "--warmup", "50", "--width", "64")),
    "sd": System("baselines/train_sd.py", "stories", 0.5, ("--lr", "1e-4", "--warmup", "50", "--min-snr-gamma", "0")),
    "dialogue": System(MLS, "dialogues", 0.5, (), "uas"),
    "divter": System(MLS, "described", 0.5, TEXT_ONLY),
}

# ---- what is measured


class Scoring(NamedTuple):
    """Answers of a system to test data and their figures. draw: where not "", Stable Diffusion makes the pictures, with
    the weights of the system `draw` (None: as published), of the prompts or of what the scoring `words` says."""

    data: str
    system: str | None = None
    options: tuple[str, ...] = ()
    draw: str | None = ""
    words: str | None = None


LAST, EVERY = ("--task", "image", "--last"), ("--task", "image")
NARRATE, CONTINUE = ("--task", "text", "--last"), ("--task", "text+image", "--last")
CONTEXTS = {"none": "no context", "texts": "text context", "pictures": "image context", "both": "image-text context"}
GUIDANCES, GUIDANCE = (1, 2, 3, 5, 7.5, 10, 15), 3  # of Figure 6; of everything else
VOKENS = (1, 2, 4, 8, 16)
FIVE = {"sd0": "zero-shot SD", "sd": "fine-tuned SD", "prefix": "MiniGPT-5 (prefix)", "lora": "MiniGPT-5 (LoRA)",
        "no-uas": "MiniGPT-5 (LoRA) without UAS"}  # fmt: skip


def scorings() -> dict[str, Scoring]:
    found = {"cc3m/sd0": Scoring("pairs", draw=None)}
    for system in ("uas", "no-cfg", "no-cap", "no-ldm", *(f"vokens-{n}" for n in VOKENS if n != 8)):
        found[f"cc3m/{system}"] = Scoring("pairs", system)
    found["cc3m/gill"] = Scoring("pairs", draw="gill")
    for guidance in GUIDANCES:
        if guidance != GUIDANCE:
            found[f"guidance/{guidance}"] = Scoring("pairs", "uas", ("--guidance", str(guidance)))
    for system in FIVE:
        drawn = {"sd0": None, "sd": "sd"}.get(system, "")
        own = None if drawn != "" else system
        for context in CONTEXTS:
            if drawn == "" or context in ("none", "texts"):  # Stable Diffusion alone cannot be told pictures
                found[f"last-{context}/{system}"] = Scoring("stories", own, (*LAST, "--context", context), drawn)
        told = "both" if drawn == "" else "texts"
        found[f"every/{system}"] = Scoring("stories", own, (*EVERY, "--context", told), drawn)
    for system in ("minigpt4", "lora", "prefix"):
        found[f"narration/{system}"] = Scoring("stories", system, NARRATE)
    found["continued/lora"] = Scoring("stories", "lora", CONTINUE)
    found["continued/words"] = Scoring("stories", "teller", CONTINUE)
    found["continued/two-stage"] = Scoring("stories", None, CONTINUE, None, "continued/words")
    found["dialogue/minigpt5"] = Scoring("dialogues", "dialogue")
    found["dialogue/words"] = Scoring("described", "divter", ("--metrics", "bleu-1"))
    found["dialogue/divter"] = Scoring("dialogues", None, (), None, "dialogue/words")
    return found


SCORINGS = scorings()

# ---- the paper's layout


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]  # of METRICS
    rows: dict[str, str]  # label -> scoring


METRICS = {  # the paper's name -> titles of evaluation, the published network's first; and whether more is better
    "CLIP-I": (("CLIP-I", "image-image score, pairing"), True),
    "CLIP-T": (("CLIP-T", "image-text score, pairing"), True),
    "IS": (("IS", "Inception-style score, judge"), True),
    "FID": (("FID", "Frechet distance, judge"), False),
    "all right": (("right all",), True),
    "S-BERT": (("S-BERT",), True),
    "ROUGE-L": (("ROUGE-L",), True),
    "METEOR": (("METEOR",), True),
    "BLEU-1": (("BLEU-1",), True),
    "BLEU-2": (("BLEU-2",), True),
    "true": (("words true of the picture",), True),
    "MM-Relevance": (("MM-Relevance, released code's", "MM-Relevance, pairing"), True),
}
PICTURE = ("CLIP-I", "IS", "FID", "all right")
TABLES = {
    "table1": Table("VIST: the picture of a story's final step, its text given", PICTURE, {
        f"{name}: {label}": f"last-{context}/{system}"
        for context, name in CONTEXTS.items() for system, label in FIVE.items()
        if f"last-{context}/{system}" in SCORINGS}),
    "table2": Table("VIST: the pictures of all steps, each after the true ones before", PICTURE, {
        label: f"every/{system}" for system, label in FIVE.items()}),
    "table3": Table("VIST: narration of the final step's picture", ("S-BERT", "ROUGE-L", "METEOR", "BLEU-1", "true"), {
        "fine-tuned MiniGPT-4": "narration/minigpt4", "MiniGPT-5 (prefix)": "narration/prefix",
        "MiniGPT-5 (LoRA)": "narration/lora"}),
    "table5": Table("MMDialog: replies", ("IS", "BLEU-1", "BLEU-2", "ROUGE-L", "MM-Relevance", "all right"), {
        "Divter": "dialogue/divter", "MiniGPT-5": "dialogue/minigpt5"}),
    "table6": Table("CC3M: a caption's picture", ("CLIP-I", "CLIP-T", "IS", "FID", "all right"), {
        "zero-shot SD": "cc3m/sd0", "GILL": "cc3m/gill", "MiniGPT-5": "cc3m/uas", "without CFG": "cc3m/no-cfg",
        "without L_CAP": "cc3m/no-cap", "without L_LDM": "cc3m/no-ldm"}),
    "figure6": Table("CC3M: guidance", ("CLIP-I", "CLIP-T", "IS", "FID", "all right"), {
        str(g): "cc3m/uas" if g == GUIDANCE else f"guidance/{g}" for g in GUIDANCES}),
    "figure7": Table("CC3M: number of vokens", ("CLIP-I", "CLIP-T", "IS", "FID", "all right"), {
        str(n): "cc3m/uas" if n == 8 else f"cc3m/vokens-{n}" for n in VOKENS}),
}  # fmt: skip
DUEL = ("continued/lora", "continued/two-stage")  # Table 4
PICTURES = {  # Figure 4 and its like for pairs: title, test data, {row of the grid: scoring}
    "figure4": ("a story's final step after its texts and pictures", "stories",
                {"MiniGPT-5 (LoRA)": "last-both/lora", "without UAS": "last-both/no-uas", "fine-tuned SD, which reads "
                 "the texts": "last-texts/sd"}),
    "pairs": ("captions", "pairs", {"zero-shot SD": "cc3m/sd0", "MiniGPT-5": "cc3m/uas", "GILL": "cc3m/gill",
                                    "without L_CAP": "cc3m/no-cap", "without CFG": "cc3m/no-cfg"}),
}  # fmt: skip
PARTS = (*TABLES, "table4", *PICTURES)


def scorings_of(part: str) -> set[str]:
    """What a table or figure needs."""
    if part == "table4":
        return set(DUEL)
    return set((PICTURES[part][2] if part in PICTURES else TABLES[part].rows).values())


# ---- as command lines


class Job(NamedTuple):
    commands: list[list[str]]  # without the interpreter; each goes on where it was stopped
    done: Path  # is there once the last command is through
    needs: tuple[str, ...] = ()  # names of jobs


SIZES = ("steps", "batch_size", "samples", "n", "denoise")  # of Options: the budget


@dataclass
class Options:
    out: Path  # data, runs, answers and scores
    weights: Path
    steps: int = 2000  # of stage 1
    n: int = 200  # test cases of a scoring
    samples: int = 24_000  # training pairs; of stories and dialogues a quarter each
    batch_size: int = 32  # of stage 1; stage 2, whose rows are longer, takes half as many
    denoise: int = 20  # steps of a picture
    device: str = "auto"
    networks: tuple[str, ...] = ()  # options of evaluation that name published networks

    def steps_of(self, system: str) -> int:
        return max(1, round(SYSTEMS[system].share * self.steps))

    def run(self, system: str, seed: int) -> Path:
        return self.out / "runs" / f"{system}.{seed}"

    def answers(self, scoring: str, seed: int) -> Path:
        return self.out / "answers" / f"{scoring.replace('/', '-')}.{seed}"

    def score(self, scoring: str, seed: int) -> Path:
        return self.out / "scores" / f"{scoring.replace('/', '-')}.{seed}.json"

    def test_tar(self, data: str) -> Path:
        return self.out / "data" / f"{data}-test.tar"


def data_jobs(options: Options) -> dict[str, Job]:
    folder, weights = options.out / "data", ["--weights", str(options.weights)]
    jobs, device = {}, ["--device", options.device]
    for name, samples in (("pairs", 1.0), ("stories", 0.25), ("dialogues", 0.25)):
        drawn, made, test = folder / f"{name}-drawn.tar", folder / f"{name}.tar", options.test_tar(name)
        count = ["--n", str(max(8, round(samples * options.samples)))]
        draw = ["miniature/world.py", name, *count, "--seed", "11", "--out", str(drawn)]
        see = ["-m", "tars", "precompute", str(drawn), *weights, *device, "--workers", "0", "--out", str(made)]
        jobs[f"data/{name}"] = Job([draw, see], made)
        held_out = ["miniature/world.py", name, "--n", str(options.n), "--seed", "12", "--split", "held-out"]
        jobs[f"test/{name}"] = Job([[*held_out, "--out", str(test)]], test)
    described = ["baselines/divter.py", str(folder / "dialogues-drawn.tar"), "--out", str(folder / "described.tar")]
    jobs["data/described"] = Job([described], folder / "described.tar", ("data/dialogues",))
    test = options.test_tar("described")
    command = ["baselines/divter.py", str(options.test_tar("dialogues")), "--out", str(test)]
    return jobs | {"test/described": Job([command], test, ("test/dialogues",))}


def train_job(options: Options, name: str, seed: int) -> Job:
    system, steps, run = SYSTEMS[name], options.steps_of(name), options.run(name, seed)
    given = {"weights": options.weights, "data": options.out / "data" / f"{system.data}.tar", "out": run}
    given |= {"steps": steps, "seed": seed, "workers": 0, "sample-every": 0, "device": options.device}
    given |= {"batch-size": max(1, options.batch_size // (1 if system.data == "pairs" else 2))}
    given |= {"uas": options.run(system.start, seed)} if system.start else {}
    command = [system.script, *(AS_PAPER if system.script == MLS else ()), *system.switches, "--resume"]
    command += [word for key, value in given.items() for word in (f"--{key}", str(value))]
    needs = (f"data/{system.data}", *((f"{system.start}.{seed}",) if system.start else ()))
    return Job([command], run / f"step-{steps:08d}" / "trained.safetensors", needs)


def score_job(options: Options, name: str, seed: int) -> Job:
    scoring, answers, out = SCORINGS[name], options.answers(name, seed), options.score(name, seed)
    common = ["--data", str(options.test_tar(scoring.data)), "--answers", str(answers), "--n", str(options.n)]
    common += ["--weights", str(options.weights), "--device", options.device]
    sampling = ["--seed", str(seed), "--sampler", "dpm", "--steps", str(options.denoise), "--batch-size", "50"]
    sampling += [] if "--guidance" in scoring.options else ["--guidance", str(GUIDANCE)]
    measure = ["-m", "evaluation", *common, "--out", str(out), *options.networks, *scoring.options]
    needs = [f"test/{scoring.data}"]
    if scoring.draw == "":
        likeliest = ["--temperature", "0", "--repetition-penalty", "1", "--max-new-tokens", "96"]
        needs += [f"{scoring.system}.{seed}"]
        measure += ["--checkpoint", str(options.run(scoring.system, seed)), *sampling, *likeliest]
        return Job([measure], out, tuple(needs))
    drawing = ["baselines/stable_diffusion.py", *common, *sampling, *scoring.options]
    if scoring.draw:
        drawing += ["--checkpoint", str(options.run(scoring.draw, seed))]
        needs += [f"{scoring.draw}.{seed}"]
    if scoring.words:
        drawing += ["--words", str(options.answers(scoring.words, seed))]
        needs += [f"{scoring.words}.{seed}"]
    return Job([drawing, measure], out, tuple(needs))


def duel_job(options: Options, seed: int) -> Job:
    out = options.score("table4", seed)
    one, other = (str(options.answers(name, seed)) for name in DUEL)
    command = ["experiments/duel.py", "--data", str(options.test_tar("stories")), "--n", str(options.n)]
    command += ["--answers", one, other, "--weights", str(options.weights), "--out", str(out)]
    return Job([command], out, tuple(f"{name}.{seed}" for name in DUEL))


def plan(options: Options, seeds: list[int], parts: list[str]) -> dict[str, Job]:
    """The jobs that `parts` of the report need, all that a job needs before it. What only finished jobs need is left
    out: a run may be deleted once its answers are scored."""
    jobs = data_jobs(options)
    for seed in seeds:
        jobs |= {f"{name}.{seed}": train_job(options, name, seed) for name in SYSTEMS}
        jobs |= {f"{name}.{seed}": score_job(options, name, seed) for name in SCORINGS}
        jobs[f"table4.{seed}"] = duel_job(options, seed)
    wanted = [f"{name}.{s}" for s in seeds for part in parts for name in sorted(scorings_of(part))]
    wanted += [f"table4.{seed}" for seed in seeds if "table4" in parts]
    ordered = {}

    def add(name: str) -> None:
        if name not in ordered:
            for need in () if jobs[name].done.exists() else jobs[name].needs:
                add(need)
            ordered[name] = jobs[name]

    for name in wanted:
        add(name)
    return ordered
