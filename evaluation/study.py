"""People compare two systems: a page that asks them, and the table of their answers (the paper's Table 4, Figure 5).

    python -m evaluation study A/ B/ --out study/      # two folders of answers of words and pictures
    python -m evaluation tally study/*.json            # after the judges' files have been put there

study/index.html contains its texts and pictures, so that it can be sent to the judges and needs no network. A case is
the history, both continuations side by side, in a random order for each judge, and three questions. The judges save
files. These and the page name the systems "left", "right" and 0 or 1; only study/study.json says which they are.

Agreement between judges: the share of pairs of judgements of the same case and question that agree, and Krippendorff's
alpha for nominal data, which is 1 where all agree and 0 where they agree as often as by chance.
"""

import argparse
import base64
import hashlib
import io
import json
import random
from collections import Counter
from itertools import chain
from pathlib import Path

from PIL import Image

from common.cli import FROM_0, make_folder, read_arguments
from common.files import read_json, write_json, write_text
from evaluation.cases import Case, compared_cases, pictures_of, read_answer
from evaluation.metrics import agreement
from generation import split
from tars.index import Unusable

TEMPLATE = Path(__file__).with_name("study.html")
QUESTIONS = {
    "language continuity": "Which text goes on better from what came before?",
    "image quality": "Which picture is better made?",
    "multimodal coherence": "Where do text and picture go better together, and with what came before?",
}
LARGEST, SMALL = 512, 128  # pixels of a picture's longer side in the page; up to SMALL it is shown pixel by pixel
VERDICTS = ("first", "second", "tie")


def picture_part(picture: Image.Image) -> dict:
    picture, buffer = picture.convert("RGB"), io.BytesIO()
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    small = max(picture.size) <= SMALL
    picture.save(buffer, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 90}))
    kind, content = "png" if small else "jpeg", base64.b64encode(buffer.getvalue()).decode()
    return {"image": f"data:image/{kind};base64,{content}", "small": small}


def parts_of(segments: list[str | Image.Image]) -> list[dict]:
    return [{"text": part} if isinstance(part, str) else picture_part(part) for part in segments]


def continuation(folder: Path, case: Case) -> list[dict]:
    """An answer, with a remark for words or a picture that did not come."""
    segments = read_answer(folder, case.key).segments
    words, pictures = split(segments)
    missing = ["(no words)"] * bool(case.words and not words) + ["(no picture)"] * bool(case.pictures and not pictures)
    return parts_of(segments) + [{"text": text, "missing": True} for text in missing]


def study() -> None:
    """`python -m evaluation study`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m evaluation study", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("answers", nargs=2, type=Path, metavar="DIR", help="folders of answers with --task text+image, or to dialogues")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for index.html and study.json")
    add("--data", nargs="+", help="the tars that were asked about; default: as a folder of answers says")
    add("--n", type=FROM_0, default=50, help="so many cases, chosen at random; 0: all")
    add("--seed", type=int, default=0, help="of the choice of cases and their order")
    args = read_arguments(parser)
    cases = compared_cases(args.answers, args.data)
    if cases[0].task not in ("text+image", "reply"):
        raise ValueError(f"{args.answers[0]}: answers to {cases[0].task}; a study compares words and pictures")
    random.Random(args.seed).shuffle(cases)
    entries = []
    for case in cases:
        try:
            before = [[turn.text, *pictures_of(case, turn.pictures)] for turn in case.before]
        except Unusable:  # a picture of the history that cannot be read
            continue
        before = [parts_of([part for part in turn if part != ""]) for turn in before]
        entries.append({"key": case.key, "before": before, "answers": [continuation(f, case) for f in args.answers]})
        if len(entries) == args.n:
            break
    study_id = hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:12]
    page = json.dumps({"id": study_id, "questions": QUESTIONS, "cases": entries}).replace("<", "\\u003c")  # no tags
    out = make_folder(args.out)
    write_json(out / "study.json", {"study": study_id, "systems": list(map(str, args.answers)), "cases": len(entries)})
    write_text(out / "index.html", TEMPLATE.read_text(encoding="utf-8").replace("/*STUDY*/null", page))
    print(f"{len(entries):,} cases, {(out / 'index.html').stat().st_size / 1e6:.1f} MB, see {out / 'index.html'}")


# ---- the judges' answers


def read_judges(files: list[Path]) -> tuple[list[str], dict[str, dict]]:
    """A study's files -> the names of its two systems, and {judge: {case: {question: choice, "left": 0 or 1}}}. Where a
    judge saved twice, the later file counts. ValueError for files of several studies or of none."""
    records = {path: read_json(path) for path in files}
    study_files = [path for path, record in records.items() if "systems" in record]
    if len(study_files) != 1:
        raise ValueError(f"the study's own study.json should be among the files once, not {len(study_files)} times")
    own_record, judges = records.pop(study_files[0]), {}
    for path, record in sorted(records.items(), key=lambda item: str(item[1].get("saved"))):
        answers = record.get("answers")
        is_known = isinstance(answers, dict) and all(isinstance(answer, dict) for answer in answers.values())
        if record.get("study") != own_record.get("study") or not is_known:
            raise ValueError(f"{path}: no judge's answers to the study of {study_files[0]}")
        judges[str(record.get("judge"))] = answers
    return own_record["systems"], judges


def verdict_of(answers: dict, question: str) -> str | None:
    """ "first", "second" or "tie"; None where the judge has not answered. ValueError for anything else."""
    choice, left = answers.get(question), answers.get("left")
    if choice is None:
        return None
    if choice not in ("left", "right", "tie") or left not in (0, 1):
        raise ValueError(f"a judge's answer {choice!r:.40} with {left!r:.40} on the left is none of the page's")
    return "tie" if choice == "tie" else VERDICTS[left if choice == "left" else 1 - left]


def count(judges: dict[str, dict]) -> dict[str, dict]:
    """{question: {verdict: its share, "judgements": their number, "agreement" and "alpha": see `agreement`}}."""
    results, cases = {}, dict.fromkeys(chain(*judges.values()))
    for question in QUESTIONS:
        rows = [[verdict_of(answers.get(case, {}), question) for answers in judges.values()] for case in cases]
        verdicts = [[verdict for verdict in row if verdict] for row in rows]
        counts = Counter(chain(*verdicts))
        shares = {verdict: counts[verdict] / max(counts.total(), 1) for verdict in VERDICTS}
        agreeing_share, alpha = agreement(verdicts)
        results[question] = shares | {"judgements": counts.total(), "agreement": agreeing_share, "alpha": alpha}
    return results


def tally_table(systems: list[str], judges: dict[str, dict]) -> str:
    """The shares and agreements in Markdown, a row for each question."""
    names = [f"{Path(name).name} better" for name in systems]
    lines = [f"{len(judges)} judge{'s' * (len(judges) != 1)}", ""]
    lines += [f"| | {' | '.join(names)} | tie | judgements | judges agree | alpha |", "| --- |" + " ---: |" * 6]
    for question, row in count(judges).items():
        shares = " | ".join(f"{row[verdict]:.2%}" for verdict in VERDICTS)
        agreement_cell = "-" if row["agreement"] is None else f"{row['agreement']:.2%}"
        alpha_cell = "-" if row["alpha"] is None else f"{row['alpha']:.3f}"
        lines.append(f"| {question} | {shares} | {row['judgements']:,} | {agreement_cell} | {alpha_cell} |")
    return "\n".join(lines) + "\n"


def tally() -> None:
    """`python -m evaluation tally`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m evaluation tally", description=__doc__, formatter_class=raw)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="study.json and the judges' files")
    systems, judges = read_judges(read_arguments(parser).files)
    print(tally_table(systems, judges))
