"""experiments/: every job of the plan on small random weights, jobs that fail and are stopped, the rule for claims."""

import json
import re
import runpy
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from PIL import Image
from random_weights import write_random_weights

from experiments import claims, paper, report
from experiments.claims import CLAIMS, FAILS, HOLDS, NOISE, UNMEASURED, Claim, seeds_to_decide, verdict
from experiments.duel import WAYS, compare, judged
from experiments.systems import (
    DUELS,
    METRICS,
    MLS,
    PARTS,
    RIVALS,
    SCORINGS,
    SYSTEMS,
    TABLES,
    Job,
    Options,
    data_that_lack,
    plan,
)
from miniature.facts import Picture, Thing
from miniature.judge import Judge
from miniature.pairing import Pairing
from published.loading import save_safetensors


class InProcess:
    """A job's command run at once in this process, which has imported everything already."""

    def __init__(self, line, stdout, **options):
        self.returncode, before = 0, (sys.argv, sys.stdout, sys.stderr)
        try:
            arguments = line[2:] if line[1] == "-m" else line[1:]
            sys.argv, sys.stdout, sys.stderr = arguments, stdout, stdout
            if line[1] == "-m":
                runpy.run_module(line[2], run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(paper.ROOT / line[1]), run_name="__main__")
        except SystemExit as end:
            self.returncode = end.code or 0
        finally:
            sys.argv, sys.stdout, sys.stderr = before

    def poll(self):
        return self.returncode


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = write_random_weights(tmp_path_factory.mktemp("weights"), small=True)
    torch.manual_seed(0)
    save_safetensors(Judge().state_dict(), folder / "judge.safetensors")
    save_safetensors(Pairing().state_dict(), folder / "pairing.safetensors")
    (folder / "minigpt5").mkdir()
    suited = {"batch_size": 2, "warmup": 1, "start_as": "a"}
    shorter = {name: suited[name] for name in ("batch_size", "warmup")}
    described = {"train_uas": suited, "train_mls": shorter}
    (folder / "minigpt5" / "config.json").write_text(json.dumps(described))
    return folder


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["experiments/paper.py", *map(str, arguments)])
    paper.main()


# ---- the plan


def test_plan():
    """All parts of the report need all that is listed, jobs come after what they need, no file is made twice."""
    options = Options(paper.ROOT / "runs", paper.ROOT)
    jobs = plan(options, [0, 1], list(PARTS))
    order = list(jobs)
    assert all(order.index(need) < order.index(name) for name, job in jobs.items() for need in job.needs)
    compared = ("figure3", *(f"table4/{name}" for name in DUELS))
    assert {f"{name}.{seed}" for name in (*SYSTEMS, *SCORINGS, *compared) for seed in (0, 1)} < set(jobs)
    assert len({job.done for job in jobs.values()}) == len(jobs)
    fewer = plan(options, [0], ["figure6"])
    trained = [name for name in fewer if name.rpartition(".")[0] in SYSTEMS]
    assert trained == ["uas.0"]
    for table in TABLES.values():
        assert set(table.columns) <= set(METRICS) and set(table.rows.values()) <= set(SCORINGS)


def test_plan_of_real_data(tmp_path):
    """The same trainings and scorings as in the drawn world, at the paper's sizes and with no setting of the miniature;
    people in the place of the judge. What needs data that are not there is left out."""
    options = Options(
        tmp_path / "out", tmp_path / "weights", data=tmp_path, networks=("--hps", "h"), **paper.PAPER_SIZES
    )
    assert len(data_that_lack(options)) == 8 and plan(options, [0], list(PARTS)) == {}
    for name in ("pairs.tar", "pairs-test.tar", "stories.tar", "stories-test.tar"):
        (tmp_path / name).touch()
    assert {path.name for path in data_that_lack(options)} == {
        "dialogues.tar",
        "dialogues-test.tar",
        "captions.jsonl",
        "captions-test.jsonl",
    }
    assert not any(name.startswith(("dialogue", "divter")) for name in plan(options, [0], list(PARTS)))
    (tmp_path / "dialogues").mkdir()  # of several tars
    for name in ("dialogues-test.tar", "captions.jsonl", "captions-test.jsonl"):
        (tmp_path / name).touch()
    jobs, drawn = plan(options, [0], list(PARTS)), plan(Options(paper.ROOT / "runs", paper.ROOT), [0], list(PARTS))
    assert (
        set(jobs) == set(drawn) | {"data/captions", "test/captions"}
        and options.tar("dialogues") == tmp_path / "dialogues"
    )
    commands = {name: job.commands for name, job in jobs.items()}
    for name, lines in commands.items():
        for command in lines:
            assert command[0] != "miniature/world.py" and not {"--sampler", "--lora-rank", "--temperature"} & set(
                command
            )
            assert "--guidance" not in command or name.startswith("guidance-"), command
    assert given(commands["uas.0"][0], "--steps") == ["110000"] and given(commands["uas.0"][0], "--batch-size") == [
        "48"
    ]
    assert given(commands["lora.0"][0], "--steps") == ["17000"] and given(commands["lora.0"][0], "--batch-size") == [
        "32"
    ]
    assert commands["table4/two-stages.0"][0][:3] == ["-m", "evaluation", "study"]
    assert given(commands["figure3.0"][0], "--hps") == ["h"]
    assert given(commands["data/described"][0], "--captions") == [str(tmp_path / "captions.jsonl")]
    assert given(commands["test/described"][0], "--captions") == [str(tmp_path / "captions-test.jsonl")]


def given(command: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(command) if name == option]


def test_commands():
    """Test data are held out; trainings and pictures have their seed and one guidance, stage 2 no settings."""
    jobs = plan(Options(paper.ROOT / "runs", paper.ROOT), [0, 1], list(PARTS))
    for name, job in jobs.items():
        system, _, seed = name.rpartition(".")
        for command in job.commands:
            if command[0] == "miniature/world.py":
                assert given(command, "--split") == (["held-out"] if name.startswith("test/") else []), command
            if system in SYSTEMS or "--guidance" in command:
                assert given(command, "--seed") == [seed], command
            if command[0] == MLS:
                assert not given(command, "--lora-rank") + given(command, "--text-weight"), command
            assert command.count("--guidance") <= 1, command
    for scoring, guidance in (("cc3m/uas", "3"), ("cc3m/no-cfg", "3"), ("guidance-7.5/sd0", "7.5")):
        assert given(jobs[f"{scoring}.0"].commands[0], "--guidance") == [guidance]
    assert given(jobs["minigpt4.0"].commands[0], "--tasks") == ["text"]
    assert given(jobs["teller.0"].commands[0], "--tasks") == ["text+image"]
    told, drawn = (jobs[f"continued/{name}.0"].commands[0] for name in ("words", "two-stages"))
    assert given(told, "--checkpoint")[0].endswith("teller.0") and "--checkpoint" not in drawn  # the plain one draws
    assert given(jobs["cc3m/gill.0"].commands[0], "--checkpoint")[0].endswith("runs/gill.0")
    for name in DUELS:
        (duel,) = jobs[f"table4/{name}.1"].commands
        first, second = duel[duel.index("--answers") + 1 :][:2]
        assert first.endswith("continued-lora.1") and second.endswith(f"continued-{name}.1")
    (wins,) = jobs["figure3.1"].commands
    assert {folder.rpartition("/")[2] for folder in wins[3 : wins.index("--out")]} == {
        f"{name.replace('/', '-')}.1" for name in RIVALS.values()
    }
    assert not any("--last" in job.commands[-1] for name, job in jobs.items() if name.startswith("narration/"))


SMALL = ("--steps", 1, "--n", 2, "--samples", 8, "--denoise", 1, "--device", "cpu", "--jobs", 1)


def test_every_job_and_the_report(monkeypatch, weights, tmp_path):
    """A second call runs nothing and writes the same report; other budgets and weights are refused."""
    monkeypatch.setattr(paper.subprocess, "Popen", InProcess)
    monkeypatch.setattr(paper, "WAIT", 0)
    small = (*SMALL, "--weights", weights, "--out", tmp_path / "out", "--report", tmp_path / "report")
    parts = ("table1", "table3", "table4", "table5", "table6", "figure3", "figure7", "figure4", "pairs")
    call(monkeypatch, *small, "--seeds", 0, "--only", *parts)
    shown = (tmp_path / "report" / "README.md").read_text()
    for part in ("table3", "table5", "table6", "figure7"):
        for label in TABLES[part].rows:
            row = next(
                line
                for line in shown.split(f"## {report.NAMES[part]}.")[1].splitlines()
                if line.startswith(f"| {label} |")
            )
            assert any(cell[:1].isdigit() for cell in row.split("| ")[2:]), row
            assert ("(paper " in row) == (part != "figure7" and label != "MiniGPT-5 (prefix)"), row
    figure3 = shown.split("## Figure 3")[1]
    won = [float(re.search(rf"^\| {label} \| ([\d.]+) \|$", figure3, re.MULTILINE)[1]) for label in RIVALS]
    assert sum(won) == pytest.approx(1, abs=0.01)  # somebody wins each case: GILL always draws
    assert "(paper 0.5718)" in shown.split("## Table 4")[1]
    assert "**not decided (one seed)**" in shown and "**not measured**" in shown  # of Table 2 nothing was asked for
    pictures = {path.name: Image.open(path).size for path in (tmp_path / "report").glob("*.png")}
    assert set(pictures) == {"figure7.png", "figure4.png", "pairs.png"} and pictures["figure4.png"][0] == 2 * (112 + 8)
    jobs = (tmp_path / "out" / "times.jsonl").read_text()
    assert not list((tmp_path / "out").rglob("*.tmp"))

    call(monkeypatch, *small, "--seeds", 0, "--only", *parts)
    assert (tmp_path / "out" / "times.jsonl").read_text() == jobs
    assert (tmp_path / "report" / "README.md").read_text() == shown
    with pytest.raises(ValueError, match="steps 1, not 2"):
        call(monkeypatch, *small, "--steps", 2)
    (weights / "judge.safetensors").write_bytes((weights / "judge.safetensors").read_bytes()[:-4] + b"1234")
    with pytest.raises(ValueError, match="weights"):
        call(monkeypatch, *small)


# ---- the runner


def script(folder, name: str, code: str, needs=()) -> Job:
    (folder / f"{name}.py").write_text(code)
    return Job([[str(folder / f"{name}.py")]], folder / f"{name}.done", tuple(needs))


def test_failures_stop_only_what_needs_them(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    write = "import pathlib, sys; p = pathlib.Path(sys.argv[0]).with_suffix('.done'); p.write_text('x')"
    jobs = {"bad": script(tmp_path, "bad", "raise SystemExit('no luck')")}
    jobs["idle"] = script(tmp_path, "idle", "")  # ends well, but its file is not there
    jobs["needs"] = script(tmp_path, "needs", write, ["bad"])
    jobs["good"] = script(tmp_path, "good", write)
    jobs["after"] = script(tmp_path, "after", write, ["good"])
    failed, stopped = paper.work(jobs, tmp_path, 2, 1)
    assert sorted(failed) == ["bad", "idle", "needs"] and not stopped
    assert jobs["after"].done.exists() and not jobs["needs"].done.exists()
    said = capsys.readouterr().out
    assert "bad.txt: no luck" in said and "needs: left out" in said


def test_stops_and_goes_on(tmp_path):
    """Asked to stop it ends its jobs and nothing else starts; killed outright, its job keeps the folder locked."""
    code = "import sys\nfrom pathlib import Path\nfrom experiments import paper\nfrom experiments.systems import Job\n"
    code += "out = Path(sys.argv[1])\nwith paper.alone(out) as lock:\n    jobs = {n: Job([[str(out / 'sleep.py')]], "
    code += "out / n) for n in 'ab'}\n    print(paper.work(jobs, out, 1, lock))\n"
    (tmp_path / "logs").mkdir()
    (tmp_path / "sleep.py").write_text("import time; print('here', flush=True); time.sleep(8)")
    (tmp_path / "runner.py").write_text(code)

    def runner():
        line = [sys.executable, tmp_path / "runner.py", tmp_path]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=paper.ROOT, env={"PYTHONPATH": "."})
        log = tmp_path / "logs" / "a.txt"
        while process.poll() is None and not (log.exists() and "here" in log.read_text()):
            time.sleep(0.05)
        log.unlink(missing_ok=True)
        return process

    process = runner()
    process.send_signal(signal.SIGTERM)
    assert "([], True)" in process.communicate(timeout=20)[0] and not (tmp_path / "logs" / "b.txt").exists()
    process = runner()
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="another process"), paper.alone(tmp_path):
        pass
    deadline = time.time() + 20
    while time.time() < deadline:
        try:
            with paper.alone(tmp_path):
                return
        except ValueError:
            time.sleep(0.1)
    raise AssertionError("the lock outlived the job")


# ---- claims and duels


def test_every_claim_can_be_measured():
    """Each compares figures that the report has, and says where the paper says so; no two are the same."""
    known = {(name, metric) for table in TABLES.values() for name in table.rows.values() for metric in table.columns}
    known |= {(f"two-stages/{side}", way) for side in ("first", "second") for way in WAYS}
    known |= {(f"figure3/{name}", "wins") for name in RIVALS.values()}
    for claim in CLAIMS:
        sides = {name for pair in claim.comparisons for side in pair for name in side}
        assert {(name, claim.metric) for name in sides} <= known, claim
        assert claim.source.startswith(("Table ", "Figure ")), claim
    assert len({str(claim) for claim in CLAIMS}) == len(CLAIMS) > 70


def test_claims_say_what_the_papers_tables_say():
    """Every claim about a table is right of the paper's own figures there, but for what its two digits cannot show."""
    theirs = report.paper_figures(json.loads(report.PUBLISHED.read_text()))
    checked, equal = 0, []
    for claim in CLAIMS:
        for better, worse in claim.comparisons:
            for difference in claims.differences(better, worse, claim.metric, theirs):
                checked += 1
                if claim.same or claim.margin:
                    assert -claim.margin <= difference and (not claim.same or difference <= claim.margin), claim
                elif difference == 0:
                    equal.append((claim.text, better, worse))
                else:
                    assert difference > 0, (claim, better, worse, difference)
    assert checked > 70, checked
    assert [(better, worse) for _, better, worse in equal] == [(("last-both/lora",), ("last-both/prefix",))]


def test_published_values_are_all_shown():
    """The rows and columns of published.json are those of the report."""
    published = json.loads(report.PUBLISHED.read_text())
    for part, rows in published.items():
        if part in TABLES:
            assert set(rows) <= set(TABLES[part].rows), part
            assert {metric for row in rows.values() for metric in row} <= set(TABLES[part].columns), part
    assert set(published) == {"source", "table1", "table2", "table3", "table4", "table5", "table6"}
    assert published["table1"]["text context: MiniGPT-5 (LoRA)"] == {"CLIP-I": 0.64, "IS": 23.86, "FID": 61.34}
    assert sum(len(row) for part in TABLES for row in published.get(part, {}).values()) == 16 * 3 + 7 * 2 + 6 + 10 + 24


@pytest.mark.parametrize(
    "differences, expected",
    [
        ([], "not measured"),
        ([0.5], "not decided (one seed)"),
        ([0.10, 0.12, 0.11], "holds"),
        ([-0.10, -0.12, -0.11], "does not hold"),
        ([0.10, 0.12, -0.11], "within noise"),
        ([0.01, 0.10, 0.19], "within noise"),  # mean 0.1, standard error 0.052: 1.9 of them, 4.3 are needed
        ([0.055, 0.10, 0.145], "within noise"),  # 3.8 of them
        ([0.08, 0.10, 0.12], "holds"),  # 8.7 of them
        ([0.0, 0.0, 0.0], "within noise"),
    ],
)
def test_verdict(differences, expected):
    assert verdict(differences) == expected


def test_verdict_with_a_margin():
    """Not worse by more than the margin; and the same: the whole interval between the margins."""
    near, below, above = [-0.003, -0.0031, -0.0029], [-0.01, -0.011, -0.009], [0.01, 0.011, 0.009]
    assert [verdict(d, 0.004) for d in (near, below, above)] == [HOLDS, FAILS, HOLDS]
    assert [verdict(d, 0.004, same=True) for d in (near, below, above)] == [HOLDS, FAILS, FAILS]
    assert verdict([-0.003, 0.003, 0.0], 0.004, same=True) == NOISE == verdict([-0.006, 0.003, 0.0], 0.004)


def test_rule_is_students():
    """Against scipy: t itself, and verdicts as a t-test of each side of the margin gives them."""
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    assert max(abs(claims.student(k) / stats.t.ppf(0.975, k) - 1) for k in range(1, 1000)) < 0.003
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(300):
        found = (0.02 * torch.randn(4, generator=generator) + 0.05 * torch.randn(1, generator=generator)).tolist()
        up, down = (stats.ttest_1samp(found, -0.01, alternative=side).pvalue for side in ("greater", "less"))
        expected = HOLDS if up < 0.025 else FAILS if down < 0.025 else NOISE
        seen.add(expected)
        assert verdict(found, 0.01) == expected or min(abs(up - 0.025), abs(down - 0.025)) < 1e-3
    assert seen == {HOLDS, FAILS, NOISE}


def test_seeds_to_decide():
    """The smallest number of seeds with which the same mean and deviation are decided."""
    for found in ([0.01, 0.10, 0.19], [0.05, 0.10, -0.03], [-0.2, 0.1, -0.1]):
        many = seeds_to_decide(found)
        mean, deviation = sum(found) / 3, claims.statistics.stdev(found)

        def decided(k: int, mean=mean, deviation=deviation) -> bool:
            return abs(mean) > claims.student(k - 1) * deviation / k**0.5

        assert decided(many) and not decided(many - 1)
    assert seeds_to_decide([0.1, -0.1, 0.0]) is None
    assert seeds_to_decide([0.0, 0.002, 0.001], 0.004, same=True) == 3  # 4.3 * 0.001 < 0.003 * 3 ** 0.5


def test_differences():
    """Seed by seed; where less is better the sign turns; a seed that lacks one of them is left out."""
    figures = {
        ("one", 0): {"FID": 2.0},
        ("other", 0): {"FID": 5.0},
        ("one", 1): {"FID": 4.0},
        ("other", 1): {"FID": 3.0},
    }
    figures |= {("one", 2): {"FID": 4.0}, ("other", 2): {"IS": 3.0}}
    assert claims.differences(("one",), ("other",), "FID", figures) == [3.0, -1.0]
    assert claims.differences(("one",), ("one", "other"), "FID", figures) == [1.5, -0.5]  # the mean of both
    assert claims.differences(("one",), ("other",), "IS", figures) == []


def test_the_weakest_comparison_decides():
    """A claim holds where all its comparisons do, and is not measured where one of them is not, unless one fails."""
    figures = {
        (name, seed): {"IS": value + seed} for seed in range(3) for name, value in (("a", 3), ("b", 2), ("c", 1))
    }

    def found(*worse: str):
        return claims.judge(Claim("x", "Table 1", "IS", claims.above("b", *worse)), figures)

    assert found("c").verdict == HOLDS and found("c", "a").verdict == FAILS and found("c", "a").worse == ("a",)
    assert found("c", "none").verdict == UNMEASURED and found("a", "none").verdict == FAILS
    assert found("c", "b").verdict == NOISE and found("c").differences == [1, 1, 1]


def test_judged():
    boat = Thing("boat", "red", "small", "left")
    last, following = Picture("sea", "day", (boat,)), Picture("sea", "night", (boat,))
    right = dict.fromkeys(WAYS, True)
    assert judged("a small red boat at sea at night", following, last, following) == right
    nothing = judged("", Picture(None, None, ()), last, following)
    assert nothing == dict.fromkeys(WAYS, False)
    words = judged("a blue boat at sea", following, last, following)  # wrong of the story and of the picture
    assert words == {"language continuity": False, "image quality": True, "multimodal coherence": False}
    assert judged("a small red boat at sea by day", last, last, following)["language continuity"]  # true of the last
    unclear = Picture("sea", "night", (boat, Thing(None)))
    assert not judged("a red boat", unclear, last, following)["image quality"]
    shares = compare([right, nothing, right], [words, right, right])["multimodal coherence"]
    assert shares == pytest.approx(
        {"first": 1 / 3, "even": 1 / 3, "second": 1 / 3, "first right": 2 / 3, "second right": 2 / 3}
    )


def test_spread():
    figures = {("a", 0): {"FID": 1.0}, ("a", 1): {"FID": 2.0}, ("a", 2): {"IS": 3.0}, ("b", 0): {"FID": 4.0}}
    assert report.values(figures, "a", "FID") == [1.0, 2.0]
    assert report.spread([]) == "-" and report.spread([0.25]) == "0.25"
    assert report.spread([1.0, 2.0, 3.0]) == "2 ± 1"
