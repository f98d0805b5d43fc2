"""The page on which people compare two systems, driven as a judge would, and the table of what judges said."""

import json
import random
import shutil
import sys

import pytest
from PIL import Image

from common.cli import run
from evaluation import __main__ as evaluate
from evaluation import cases, metrics, study
from evaluation.cases import write_answer
from evaluation.study import QUESTIONS, VERDICTS
from miniature import world

PROGRAMS = [shutil.which(name) for name in ("chromium", "chromedriver")]
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluation", *map(str, arguments)])
    evaluate.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stories, and two systems' continuations of their last steps: A has the true ones, B those of the next story."""
    folder = tmp_path_factory.mktemp("study")
    world.write_stories(folder / "stories.tar", 6, 1, "held-out")
    steps, _ = cases.read_cases([str(folder / "stories.tar")], "text+image", True)
    for name, said in (("A", steps), ("B", steps[1:] + steps[:1])):
        settings = {"task": "text+image", "context": "both", "data": cases.digest(steps)}
        cases.open_answers(folder / name, settings, [str(folder / "stories.tar")])
        for case, other in zip(steps, said, strict=True):
            write_answer(folder / name, case.key, [other.turn.text, *cases.pictures_of(other, other.pictures)])
    write_answer(folder / "B", steps[0].key, ["<script>alert(1)</script> & no picture"])
    return folder


def written(monkeypatch, folder, out, *options) -> dict:
    call(monkeypatch, "study", folder / "A", folder / "B", "--out", out, *options)
    return json.loads((out / "study.json").read_text())


def page_data(out) -> dict:
    page = (out / "index.html").read_text(encoding="utf-8")
    return json.loads(page.split("const study = ")[1].split("\n")[0])


# ---- the page


def test_page(monkeypatch, folder, tmp_path):
    """All cases with their history and both continuations; nothing from elsewhere, no system's name; the seed says
    which cases and in which order."""
    key = written(monkeypatch, folder, tmp_path / "a")
    content, page = page_data(tmp_path / "a"), (tmp_path / "a" / "index.html").read_text(encoding="utf-8")
    assert key == {"study": content["id"], "systems": [str(folder / name) for name in "AB"], "cases": 6}
    assert "http:" not in page.replace("http-equiv", "") and "https:" not in page and str(folder) not in page
    steps = {case.key: case for case in cases.read_cases([str(folder / "stories.tar")], "text+image", True)[0]}
    assert {case["key"] for case in content["cases"]} == set(steps)
    for case in content["cases"]:
        true = steps[case["key"]]
        assert [turn[0]["text"] for turn in case["before"]] == [turn.text for turn in true.before]
        assert all(turn[1]["image"].startswith("data:image/png;base64,") for turn in case["before"])
        assert case["answers"][0][0]["text"] == true.turn.text != case["answers"][1][0]["text"]
    assert sum(part.get("missing", False) for case in content["cases"] for part in case["answers"][1]) == 1

    orders = []
    for seed in (0, 0, 1):
        written(monkeypatch, folder, tmp_path / "b", "--seed", seed, "--n", 4)
        orders.append([case["key"] for case in page_data(tmp_path / "b")["cases"]])
    assert orders[0] == orders[1] != orders[2] and all(len(set(order)) == 4 for order in orders)


def test_large_pictures_are_made_smaller():
    part = study.picture_part(Image.effect_noise((1200, 900), 80).convert("RGBA"))
    assert part["image"].startswith("data:image/jpeg;base64,") and not part["small"] and len(part["image"]) < 300_000


def fails(monkeypatch, capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(lambda: call(monkeypatch, *arguments))
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def test_folders_that_do_not_go_together(monkeypatch, capsys, folder, tmp_path):
    def study_fails(*arguments) -> str:
        return fails(monkeypatch, capsys, "study", *arguments, "--out", tmp_path / "out")

    other = shutil.copytree(folder / "B", tmp_path / "other")
    assert "no such folder of answers" in study_fails(folder / "A", tmp_path / "none")
    for name, value in (("task", "image"), ("data", "0123")):
        settings = json.loads((folder / "B" / cases.SETTINGS).read_text())
        (other / cases.SETTINGS).write_text(json.dumps(settings | {name: value}))
        assert f"other holds answers made with {name} " in study_fails(folder / "A", other)
    (other / cases.SETTINGS).unlink()
    assert "--data is needed" in study_fails(other, other)
    world.write_stories(tmp_path / "stories.tar", 6, 2, "held-out")
    assert "no case of" in study_fails(folder / "A", other, "--data", tmp_path / "stories.tar")
    for path in other.glob("*.json"):
        path.unlink()
    assert "that all of them have answered" in study_fails(folder / "A", other)
    assert not (tmp_path / "out").exists()


class Judge:
    """Somebody with a browser, which is offline and saves into `downloads`."""

    def __init__(self, page, downloads):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = PROGRAMS[0]
        for flag in FLAGS:
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(PROGRAMS[1]))
        self.browser.set_network_conditions(offline=True, latency=0, throughput=0)
        self.browser.set_window_size(1200, 900)
        self.address = page.as_uri()
        self.browser.get(self.address)

    def one(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def choose(self, question: str, choice: str) -> None:
        self.browser.execute_script(
            "document.querySelector(arguments[0]).click()", f'input[name="{question}"][value={choice}]'
        )

    def sides(self) -> list[str]:
        return [side.text for side in self.all("#sides article div")]


@pytest.fixture
def judge(monkeypatch, folder, tmp_path):
    pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if None in PROGRAMS:
        pytest.skip("no chromium with chromedriver")
    written(monkeypatch, folder, tmp_path / "study")
    judge = Judge(tmp_path / "study" / "index.html", tmp_path / "study")
    yield judge
    judge.browser.quit()


def test_a_judge(judge, monkeypatch, folder, tmp_path, capsys):
    """A judge who always finds the true continuation better, wherever it stands, in words; ties in pictures; and right
    in the third question. Half way the page is loaded anew. What is saved is what was chosen."""
    content, out = page_data(tmp_path / "study"), tmp_path / "study"
    assert not judge.one("#case").is_displayed()
    judge.one("#judge").send_keys("Ann B. 7")
    judge.one("#begin").click()
    lefts = []
    for number, case in enumerate(content["cases"]):
        if number == 3:
            judge.browser.get(judge.address)
        assert judge.one("#count").text == f"{number + 1} of 6"
        assert [card.text for card in judge.all("#before > div")] == [turn[0]["text"] for turn in case["before"]]
        texts = ["\n".join(part["text"] for part in answer if "text" in part) for answer in case["answers"]]
        assert sorted(judge.sides()) == sorted(texts)  # the one with <script> in it, too
        lefts.append(texts.index(judge.sides()[0]))
        assert not judge.one("#next").is_enabled()
        judge.choose("language continuity", ("left", "right")[lefts[-1]])
        judge.choose("image quality", "tie")
        assert not judge.one("#next").is_enabled()
        judge.choose("multimodal coherence", "right")
        if number == 1:
            for width in (400, 1200):
                judge.browser.set_window_size(width, 1300)
                assert judge.browser.execute_script("return document.documentElement.scrollWidth") <= width
                judge.browser.save_screenshot(str(tmp_path / f"{width}.png"))
            judge.one("#back").click()
            assert judge.sides()[0] and len(judge.all("input:checked")) == 3
            judge.one("#next").click()
            assert len(judge.all("input:checked")) == 3
        judge.one("#next").click()
    assert judge.one("#end").is_displayed() and judge.one("#count").text == "6 of 6 judged"
    judge.one("#save").click()
    saved = out / "judge-Ann-B-7.json"
    for _ in range(50):
        if saved.exists() and saved.stat().st_size:
            break
        judge.browser.execute_async_script("setTimeout(arguments[0], 100)")
    record = json.loads(saved.read_text())
    assert record["study"] == content["id"] and record["judge"] == "Ann B. 7"
    chosen = [record["answers"][case["key"]] for case in content["cases"]]
    assert [answers["left"] for answers in chosen] == lefts
    assert {answers["image quality"] for answers in chosen} == {"tie"}
    assert [entry for entry in judge.browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    capsys.readouterr()
    call(monkeypatch, "tally", *sorted(out.glob("*.json")))
    shown = capsys.readouterr().out
    assert "1 judge\n" in shown and "| language continuity | 100.00% | 0.00% | 0.00% | 6 | - | - |" in shown
    figures = study.count(study.read_judges(sorted(out.glob("*.json")))[1])
    assert figures["image quality"]["tie"] == 1
    assert figures["multimodal coherence"]["first"] == pytest.approx(sum(lefts) / 6)  # A stood right where B is left


# ---- what the judges said


def random_judges(seed: int, count: int = 3) -> dict[str, dict]:
    rng, judges = random.Random(seed), {}
    for judge in range(count):
        answers = judges[f"judge {judge}"] = {}
        for case in range(20):
            if rng.random() < 0.8:
                told = {question: rng.choice(("left", "right", "tie")) for question in QUESTIONS if rng.random() < 0.9}
                answers[f"case {case}"] = {"left": rng.randint(0, 1), **told}
    return judges


def test_shares():
    """Two judges, one case where they stand opposite: left is B for one of them. Counted by hand."""
    judges = {"ann": {"a": {"left": 0, "image quality": "left"}, "b": {"left": 1, "image quality": "left"}}}
    judges["bob"] = {
        "a": {"left": 1, "image quality": "right"},
        "b": {"left": 0},
        "c": {"left": 0, "image quality": "tie"},
    }
    row = study.count(judges)["image quality"]
    assert [row[verdict] for verdict in VERDICTS] == [2 / 4, 1 / 4, 1 / 4] and row["judgements"] == 4
    assert row["agreement"] == 1 and row["alpha"] is None  # of the one case that both judged both say "first"
    with pytest.raises(ValueError, match="none of the page's"):
        study.count({"ann": {"a": {"left": 2, "image quality": "left"}}})


@pytest.mark.parametrize("count", [2, 3, 4])
def test_alpha_is_that_of_nltk(count):
    """Judges who left cases out; shares and agreement are summed here in another way."""
    agreement = pytest.importorskip("nltk.metrics.agreement", reason="nltk is not installed")
    for seed in range(20):
        judges = random_judges(seed, count)
        for question, row in study.count(judges).items():
            rows = [
                (judge, case, study.verdict_of(given, question))
                for judge, answers in judges.items()
                for case, given in answers.items()
                if question in given
            ]
            twice = [a for a in rows if any(a[1] == b[1] and a[0] != b[0] for b in rows)]
            pairs = [a[2] == b[2] for a in twice for b in twice if a[1] == b[1] and a[0] < b[0]]
            assert row["alpha"] == pytest.approx(agreement.AnnotationTask(twice).alpha(), abs=1e-12)
            assert row["agreement"] == pytest.approx(sum(pairs) / len(pairs))
            assert row["judgements"] == len(rows) and sum(row[verdict] for verdict in VERDICTS) == pytest.approx(1)


def test_alpha_of_krippendorffs_example():
    """Four observers, twelve units, some of them not seen: alpha for nominal data is 0.743."""
    units = ["111", "2232", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3"]
    assert metrics.agreement([list(unit) for unit in units])[1] == pytest.approx(0.743, abs=5e-4)


def test_tally_of_files(monkeypatch, capsys, tmp_path):
    """A judge who saved twice counts once, with the later file; files of another study and without a key are errors."""

    def save(name: str, **content):
        (tmp_path / name).write_text(json.dumps(content))

    def answers(choice: str) -> dict:
        return {"a": {"left": 0, **dict.fromkeys(QUESTIONS, choice)}}

    save("study.json", study="1", systems=["x/A", "x/B"], cases=1)
    save("later.json", study="1", judge="ann", saved="2026-01-02", answers=answers("right"))
    save("first.json", study="1", judge="ann", saved="2026-01-01", answers=answers("left"))
    save("bob.json", study="1", judge="bob", saved="2026-01-01", answers=answers("right"))
    call(monkeypatch, "tally", *sorted(tmp_path.glob("*.json")))
    shown = capsys.readouterr().out
    assert "2 judges" in shown and "| | A better | B better | tie |" in shown
    assert "| image quality | 0.00% | 100.00% | 0.00% | 2 | 100.00% | - |" in shown
    for number, wrong in (("2", {}), ("1", ["left"]), ("1", {"a": ["left"]})):
        save("other.json", study=number, judge="eve", answers=wrong)
        shown = fails(monkeypatch, capsys, "tally", *tmp_path.glob("*.json"))
        assert "other.json: no judge's answers to the study" in shown
    assert "study.json should be among the files once" in fails(monkeypatch, capsys, "tally", tmp_path / "bob.json")
    call(monkeypatch, "tally", tmp_path / "study.json")
    assert "0 judges" in capsys.readouterr().out
