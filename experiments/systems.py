"""Every training and scoring of the paper's experiments, as lists: SYSTEMS, SCORINGS, TABLES, DUELS, PICTURES.

    plan(options, seeds, parts) -> {name: Job}      what `paper.py` runs: data, then trainings, then scorings, each once

A system is a script of this repository with its switches. Trainings and answers differ between seeds, the test data do
not. The data are pairs (the paper: CC3M), stories (VIST) and dialogues (MMDialog): the user's, or those of the drawn
world, whose test data are held out: their kind, colour and scene were never trained together.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments.duel import WAYS

# ---- what is trained


class System(NamedTuple):
    script: str
    data: str  # a training tar (data_jobs)
    switches: tuple[str, ...] = ()
    start: str | None = None  # the system whose run is stage 1
    small: tuple[str, ...] = ()  # switches for the drawn world alone


UAS, MLS = "train_uas.py", "train_mls.py"
TEXT_ONLY = ("--no-uas", "--words-only")
SYSTEMS = {
    "uas": System(UAS, "pairs"),
    "no-cfg": System(UAS, "pairs", ("--no-cfg",)),
    "no-cap": System(UAS, "pairs", ("--no-cap",)),
    "no-ldm": System(UAS, "pairs", ("--no-ldm",)),
    **{f"vokens-{n}": System(UAS, "pairs", ("--vokens", str(n))) for n in (1, 2, 4, 16)},
    "lora": System(MLS, "stories", (), "uas"),
    "prefix": System(MLS, "stories", ("--prefix",), "uas"),
    "no-uas": System(MLS, "stories", ("--no-uas",)),
    "minigpt4": System(MLS, "stories", ("--tasks", "text", *TEXT_ONLY)),  # it narrates a picture that is given
    "teller": System(MLS, "stories", ("--tasks", "text+image", *TEXT_ONLY)),  # it tells the next step
    "gill": System("baselines/gill.py", "pairs", small=("--lr", "1e-3", "--warmup", "50", "--width", "64")),
    "sd": System("baselines/train_sd.py", "stories", small=("--lr", "1e-4", "--warmup", "50", "--min-snr-gamma", "0")),
    "dialogue": System(MLS, "dialogues", (), "uas"),
    "divter": System(MLS, "described", ("--no-uas", "--no-ldm")),
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
    guidance: float | None = None  # None: the usual one


LAST, EVERY = ("--task", "image", "--last"), ("--task", "image")
NARRATE, CONTINUE = ("--task", "text"), ("--task", "text+image", "--last")
CONTEXTS = {"none": "no context", "texts": "text context", "pictures": "image context", "both": "image-text context"}
GUIDANCES, VOKENS = (1, 2, 3, 5, 7.5, 10, 15), (1, 2, 4, 8, 16)
FIVE = {"sd0": "zero-shot SD", "sd": "fine-tuned SD", "prefix": "MiniGPT-5 (prefix)", "lora": "MiniGPT-5 (LoRA)",
        "no-uas": "MiniGPT-5 (LoRA) without UAS"}  # fmt: skip


def scorings() -> dict[str, Scoring]:
    found = {"cc3m/sd0": Scoring("pairs", draw=None)}
    for system in ("uas", "no-cfg", "no-cap", "no-ldm", *(f"vokens-{n}" for n in VOKENS if n != 8)):
        found[f"cc3m/{system}"] = Scoring("pairs", system)
    found["cc3m/gill"] = Scoring("pairs", draw="gill")
    for guidance in GUIDANCES:
        found[f"guidance-{guidance}/uas"] = Scoring("pairs", "uas", guidance=guidance)
        found[f"guidance-{guidance}/sd0"] = Scoring("pairs", draw=None, guidance=guidance)
    for system in FIVE:
        drawn = {"sd0": None, "sd": "sd"}.get(system, "")
        own = None if drawn != "" else system
        for context in CONTEXTS if drawn == "" else ("none", "texts"):  # SD alone cannot be told pictures
            told = ("--context", context)
            found[f"last-{context}/{system}"] = Scoring("stories", own, (*LAST, *told), drawn)
            if drawn != "" or context == "both":
                found[f"every-{context}/{system}"] = Scoring("stories", own, (*EVERY, *told), drawn)
    for system in ("minigpt4", "lora", "prefix"):
        found[f"narration/{system}"] = Scoring("stories", system, NARRATE)
    found["continued/lora"] = Scoring("stories", "lora", CONTINUE)
    found["continued/words"] = Scoring("stories", "teller", CONTINUE)
    found["continued/two-stages"] = Scoring("stories", None, CONTINUE, None, "continued/words")
    found["continued/two-stages-tuned"] = Scoring("stories", None, CONTINUE, "sd", "continued/words")
    found["dialogue/minigpt5"] = Scoring("dialogues", "dialogue")
    found["dialogue/words"] = Scoring("described", "divter", ("--metrics", "bleu-1"))
    found["dialogue/divter"] = Scoring("dialogues", None, (), None, "dialogue/words")
    return found


SCORINGS = scorings()

# ---- the paper's layout


class Table(NamedTuple):
    title: str
    columns: tuple[str, ...]  # of METRICS
    rows: dict[str, str]  # label -> scoring; of a figure "curve, number"


METRICS = {  # the paper's name -> titles of evaluation, the published network's first; and whether more is better
    "CLIP-I": (("CLIP-I", "image-image score, pairing"), True),
    "CLIP-T": (("CLIP-T", "image-text score, pairing"), True),
    "IS": (("IS", "Inception-style score, judge"), True),
    "FID": (("FID", "Frechet distance, judge"), False),
    "FID per story": (("FID, mean over stories", "Frechet distance, judge, mean over stories"), False),
    "all right": (("right all",), True),
    "S-BERT": (("S-BERT",), True),
    "ROUGE-L": (("ROUGE-L, released package's", "ROUGE-L"), True),
    "METEOR": (("METEOR",), True),
    "BLEU-1": (("BLEU-1",), True),
    "BLEU-2": (("BLEU-2",), True),
    "BLEU-1, MMDialog's": (("BLEU-1, MMDialog's",), True),
    "BLEU-2, MMDialog's": (("BLEU-2, MMDialog's",), True),
    "true": (("words true of the picture",), True),
    "MM-Relevance": (("MM-Relevance, released code's", "MM-Relevance, pairing"), True),
    "wins": (("wins",), True),  # of `python -m evaluation wins`
    **{way: ((way,), True) for way in WAYS},  # of duel.py
}
PICTURE, CAPTIONED = ("CLIP-I", "IS", "FID", "all right"), ("CLIP-I", "CLIP-T", "IS", "FID", "all right")
SD0, TOLD = FIVE["sd0"], {"none": "no context", "texts": "text context"}
TABLES = {
    "table1": Table("VIST: the picture of a story's final step, its text given", PICTURE, {
        f"{name}: {label}": f"last-{context}/{system}"
        for context, name in CONTEXTS.items() for system, label in FIVE.items()
        if f"last-{context}/{system}" in SCORINGS}),
    "table2": Table("VIST: the pictures of all steps, each after the true ones before",
                    ("CLIP-I", "FID per story", "IS", "FID", "all right"), {
        **{f"{FIVE[system]}, {name}": f"every-{context}/{system}"
           for system in ("sd0", "sd") for context, name in TOLD.items()},
        **{FIVE[system]: f"every-both/{system}" for system in ("prefix", "lora", "no-uas")}}),
    "table3": Table("VIST: narration of every step's picture", ("S-BERT", "ROUGE-L", "METEOR", "BLEU-1", "true"), {
        "fine-tuned MiniGPT-4": "narration/minigpt4", "MiniGPT-5 (prefix)": "narration/prefix",
        "MiniGPT-5 (LoRA)": "narration/lora"}),
    "table5": Table("MMDialog: replies", ("IS", "BLEU-1", "BLEU-2", "ROUGE-L", "MM-Relevance", "BLEU-1, MMDialog's",
                                          "BLEU-2, MMDialog's", "all right"), {
        "Divter": "dialogue/divter", "MiniGPT-5": "dialogue/minigpt5"}),
    "table6": Table("CC3M: a caption's picture", CAPTIONED, {
        SD0: "cc3m/sd0", "GILL": "cc3m/gill", "MiniGPT-5": "cc3m/uas", "without CFG": "cc3m/no-cfg",
        "without L_CAP": "cc3m/no-cap", "without L_LDM": "cc3m/no-ldm"}),
    "figure6": Table("CC3M: guidance", CAPTIONED, {
        f"{label}, {g}": f"guidance-{g}/{system}" for system, label in (("uas", "MiniGPT-5"), ("sd0", SD0))
        for g in GUIDANCES}),
    "figure7": Table("CC3M: number of vokens", CAPTIONED, {
        f"MiniGPT-5, {n}": "cc3m/uas" if n == 8 else f"cc3m/vokens-{n}" for n in VOKENS}),
}  # fmt: skip
# Comparisons of several systems' answers, each with the figures of all of them in one file. Table 4 is two of them.
DUELS = {"two-stages": ("continued/lora", "continued/two-stages"),
         "two-stages-tuned": ("continued/lora", "continued/two-stages-tuned")}  # fmt: skip
RIVALS = {label: name for label, name in TABLES["table6"].rows.items() if label != SD0}  # of Figure 3
PICTURES = {  # Figure 4 and its like for pairs: title, test data, {row of the grid: scoring}
    "figure4": ("a story's final step after its texts and pictures", "stories",
                {"MiniGPT-5 (LoRA)": "last-both/lora", "without UAS": "last-both/no-uas", "fine-tuned SD, which reads "
                 "the texts": "last-texts/sd"}),
    "pairs": ("captions", "pairs", {SD0: "cc3m/sd0", "MiniGPT-5": "cc3m/uas", "GILL": "cc3m/gill",
                                    "without L_CAP": "cc3m/no-cap", "without CFG": "cc3m/no-cfg"}),
}  # fmt: skip
PARTS = (*TABLES, "table4", "figure3", *PICTURES)


def scorings_of(part: str) -> set[str]:
    """What a table or figure needs."""
    if part == "table4":
        return {name for pair in DUELS.values() for name in pair}
    if part == "figure3":
        return set(RIVALS.values())
    return set((PICTURES[part][2] if part in PICTURES else TABLES[part].rows).values())


# ---- as command lines


class Job(NamedTuple):
    commands: list[list[str]]  # without the interpreter; each goes on where it was stopped. None: the user's own data
    done: Path  # is there once the last command is through
    needs: tuple[str, ...] = ()  # names of jobs


SIZES = ("steps", "batch_size", "samples", "n", "denoise")  # of Options: the budget
PAPER_SIZES = {"steps": 110_000, "batch_size": 48, "samples": 0, "n": 0, "denoise": 50}  # with data of the user's
KINDS = ("pairs", "stories", "dialogues")


@dataclass
class Options:
    out: Path  # runs, answers, scores, drawn data
    weights: Path
    steps: int = 600  # of stage 1
    n: int = 100  # test cases of a scoring; 0: all
    samples: int = 12_000  # drawn training pairs; of stories and dialogues a quarter each
    batch_size: int = 16  # of stage 1
    denoise: int = 10  # steps of a picture
    device: str = "auto"
    networks: tuple[str, ...] = ()  # options of evaluation that name published networks
    data: Path | None = None  # the user's tars; None: the drawn world

    def steps_of(self, system: str) -> int:
        """On stories and dialogues fewer than in stage 1: half of them in the drawn world; else as many as four epochs
        of VIST have, in batches of 32, beside the 110,000 of stage 1."""
        share = 1 if SYSTEMS[system].data == "pairs" else 17_000 / 110_000 if self.data else 0.5
        return max(1, round(share * self.steps))

    def batch_size_of(self, system: str) -> int:
        """Samples of stories and dialogues are longer: the paper has 32 of them beside 48 pairs."""
        share = 1 if SYSTEMS[system].data == "pairs" else 2 / 3 if self.data else 0.5
        return max(1, int(share * self.batch_size))

    def run(self, system: str, seed: int) -> Path:
        return self.out / "runs" / f"{system}.{seed}"

    def answers(self, scoring: str, seed: int) -> Path:
        return self.out / "answers" / f"{scoring.replace('/', '-')}.{seed}"

    def score(self, scoring: str, seed: int) -> Path:
        return self.out / "scores" / f"{scoring.replace('/', '-')}.{seed}.json"

    def tar(self, data: str, test: bool = False) -> Path:
        """A tar, or where the user has several, the folder of them."""
        made = data == "described"  # of the dialogues
        path = (self.out / "data" if made or not self.data else self.data) / f"{data}{'-test' if test else ''}"
        return path if path.is_dir() else path.with_name(f"{path.name}.tar")

    def captions(self, test: bool = False) -> Path:
        """What the pictures of the user's dialogues show, for Divter."""
        return self.data / f"captions{'-test' if test else ''}.jsonl"


def data_jobs(options: Options) -> dict[str, Job]:
    jobs = {}
    for name in KINDS:
        made, test = options.tar(name), options.tar(name, test=True)
        drawn, weights = made.with_name(f"{name}-drawn.tar"), ["--weights", str(options.weights)]
        count = ["--n", str(max(8, round((1 if name == "pairs" else 0.25) * options.samples)))]
        draw = ["miniature/world.py", name, *count, "--seed", "11", "--out", str(drawn)]
        see = ["-m", "tars", "precompute", str(drawn), *weights, "--device", options.device, "--workers", "0"]
        held_out = ["miniature/world.py", name, "--n", str(options.n), "--seed", "12", "--split", "held-out"]
        jobs[f"data/{name}"] = Job([] if options.data else [draw, [*see, "--out", str(made)]], made)
        jobs[f"test/{name}"] = Job([] if options.data else [[*held_out, "--out", str(test)]], test)
    for kind, test in (("data", False), ("test", True)):
        source = options.tar("dialogues", test)
        source = source if test or options.data else source.with_name("dialogues-drawn.tar")
        out, needs = options.tar("described", test), [f"{kind}/dialogues"]
        describe = ["baselines/divter.py", str(source), "--out", str(out)]
        if options.data:
            jobs[f"{kind}/captions"] = Job([], options.captions(test))
            needs, describe = [*needs, f"{kind}/captions"], [*describe, "--captions", str(options.captions(test))]
        jobs[f"{kind}/described"] = Job([describe], out, tuple(needs))
    return jobs


def train_job(options: Options, name: str, seed: int) -> Job:
    system, steps, run = SYSTEMS[name], options.steps_of(name), options.run(name, seed)
    given = {"weights": options.weights, "data": options.tar(system.data), "out": run, "steps": steps, "seed": seed}
    given |= {"batch-size": options.batch_size_of(name), "sample-every": 0, "device": options.device}
    given |= {} if options.data else {"workers": 0}
    given |= {"uas": options.run(system.start, seed)} if system.start else {}
    command = [system.script, *(() if options.data else system.small), *system.switches, "--resume"]
    command += [word for key, value in given.items() for word in (f"--{key}", str(value))]
    needs = (f"data/{system.data}", *((f"{system.start}.{seed}",) if system.start else ()))
    return Job([command], run / f"step-{steps:08d}" / "trained.safetensors", needs)


def score_job(options: Options, name: str, seed: int) -> Job:
    scoring, answers, out = SCORINGS[name], options.answers(name, seed), options.score(name, seed)
    common = ["--data", str(options.tar(scoring.data, test=True)), "--answers", str(answers), "--n", str(options.n)]
    common += ["--weights", str(options.weights), "--device", options.device]
    sampling = ["--seed", str(seed), "--steps", str(options.denoise)]
    sampling += [] if options.data else ["--sampler", "dpm", "--batch-size", "50"]
    guidance = scoring.guidance or (None if options.data else 3)
    sampling += ["--guidance", str(guidance)] if guidance else []
    measure = ["-m", "evaluation", *common, "--out", str(out), *options.networks, *scoring.options]
    needs = [f"test/{scoring.data}"]
    if scoring.draw == "":
        likeliest = ["--temperature", "0", "--repetition-penalty", "1", "--max-new-tokens", "96"]
        needs += [f"{scoring.system}.{seed}"]
        measure += ["--checkpoint", str(options.run(scoring.system, seed)), *sampling]
        return Job([measure + ([] if options.data else likeliest)], out, tuple(needs))
    drawing = ["baselines/stable_diffusion.py", *common, *sampling, *scoring.options]
    if scoring.draw:
        drawing += ["--checkpoint", str(options.run(scoring.draw, seed))]
        needs += [f"{scoring.draw}.{seed}"]
    if scoring.words:
        drawing += ["--words", str(options.answers(scoring.words, seed))]
        needs += [f"{scoring.words}.{seed}"]
    return Job([drawing, measure], out, tuple(needs))


def duel_job(options: Options, name: str, seed: int) -> Job:
    """Table 4: the judge where it knows the world, else the page for people."""
    needs, data = tuple(f"{scoring}.{seed}" for scoring in DUELS[name]), ["--data", str(options.tar("stories", True))]
    sides = [str(options.answers(scoring, seed)) for scoring in DUELS[name]]
    if options.data:
        out = options.out / "study" / f"{name}.{seed}"
        return Job([["-m", "evaluation", "study", *sides, *data, "--out", str(out)]], out / "index.html", needs)
    out = options.score(f"table4/{name}", seed)
    command = ["experiments/duel.py", *data, "--n", str(options.n), "--answers", *sides]
    return Job([[*command, "--weights", str(options.weights), "--out", str(out)]], out, needs)


def wins_job(options: Options, seed: int) -> Job:
    """Figure 3."""
    rivals, out = tuple(dict.fromkeys(RIVALS.values())), options.score("figure3", seed)
    command = ["-m", "evaluation", "wins", *(str(options.answers(name, seed)) for name in rivals), "--out", str(out)]
    command += ["--data", str(options.tar("pairs", test=True)), "--weights", str(options.weights)]
    if "--hps" in options.networks:
        command += ["--hps", options.networks[options.networks.index("--hps") + 1]]
    needs = tuple(f"{name}.{seed}" for name in rivals)
    return Job([[*command, "--device", options.device]], out, needs)


def all_jobs(options: Options, seeds: list[int]) -> dict[str, Job]:
    jobs = data_jobs(options)
    for seed in seeds:
        jobs |= {f"{name}.{seed}": train_job(options, name, seed) for name in SYSTEMS}
        jobs |= {f"{name}.{seed}": score_job(options, name, seed) for name in SCORINGS}
        jobs |= {f"table4/{name}.{seed}": duel_job(options, name, seed) for name in DUELS}
        jobs[f"figure3.{seed}"] = wins_job(options, seed)
    return jobs


def data_that_lack(options: Options) -> list[Path]:
    """Of the user's data what is not there; what needs it is left out of the plan."""
    return [job.done for job in data_jobs(options).values() if not job.commands and not job.done.exists()]


def plan(options: Options, seeds: list[int], parts: list[str]) -> dict[str, Job]:
    """The jobs that `parts` of the report need, all that a job needs before it. What only finished jobs need is left
    out: a run may be deleted once its answers are scored."""
    jobs, ordered = all_jobs(options, seeds), {}
    wanted = [f"{name}.{seed}" for seed in seeds for part in parts for name in sorted(scorings_of(part))]
    wanted += [f"table4/{name}.{seed}" for seed in seeds if "table4" in parts for name in DUELS]
    wanted += [f"figure3.{seed}" for seed in seeds if "figure3" in parts]

    def possible(name: str) -> bool:
        return jobs[name].done.exists() or (bool(jobs[name].commands) and all(map(possible, jobs[name].needs)))

    def add(name: str) -> None:
        if name not in ordered:
            for need in () if jobs[name].done.exists() else jobs[name].needs:
                add(need)
            ordered[name] = jobs[name]

    for name in filter(possible, wanted):
        add(name)
    return ordered
