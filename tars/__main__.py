"""Convert your own data and the published data sets into tars, and tars into tars of precomputed tensors.

`python -m tars COMMAND --help` has the options.
"""

import argparse
import os
from pathlib import Path

from common.cli import DTYPES, FROM_0, FROM_1, add_model_options, run
from tars import datasets, precompute

SOURCES = {
    "pairs": "folders of KEY.jpg, KEY.txt; or a .csv or .jsonl of file and caption, and the pictures' folders",
    "turns": "a .jsonl of stories or dialogues, and folders of pictures if they lie elsewhere",
    "vist": "X.story-in-sequence.json or X_cleaned.json, and folders of pictures if they lie elsewhere",
    "mmdialog": "JSON lines, and folders of pictures if they lie elsewhere",
    "cc3m": "tsv of caption and path, and folders from which the paths start; or folders of KEY.jpg, KEY.txt",
}


def arguments() -> argparse.Namespace:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m tars", description=__doc__, **style)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, sources in SOURCES.items():
        add = commands.add_parser(name, help=sources, description=datasets.__doc__, **style).add_argument
        add("sources", nargs="+", type=Path, metavar="SOURCE", help=sources)
        add("--out", type=Path, required=True, help="the tar to write")
        add("--workers", type=FROM_1, default=min(8, os.cpu_count() or 1), help="threads that decode pictures")
        if name == "mmdialog":
            add("--max-words", type=FROM_0, default=50, help="end a dialogue before a turn of more words; 0: never")
    about = precompute.__doc__.split("\n")[0]
    command = commands.add_parser("precompute", help=about, description=precompute.__doc__, **style)
    add = command.add_argument
    add("sources", nargs="+", metavar="TAR", help="tars of pairs, or of stories and dialogues; folders, patterns")
    add("--out", type=Path, required=True, help="the tar to write; of several sources the folder")
    add_model_options(command)
    add("--store", choices=precompute.STORE, default="fp16", help="dtype of what is written")
    add("--no-captions", action="store_true", help="leave captions to the text encoder in training: smaller tars")
    add("--batch-size", type=FROM_1, default=16, help="pictures encoded at once")
    add("--workers", type=FROM_0, default=2, help="processes that read pictures; 0: none")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.command == "precompute":
        options = {"weights": args.weights, "captions": not args.no_captions, "dtype": DTYPES[args.dtype]}
        options |= {"store": args.store, "device": args.device}
        precompute.precompute(args.sources, args.out, args.batch_size, args.workers, **options)
        return
    options = {"max_words": args.max_words} if args.command == "mmdialog" else {}
    report = datasets.convert(args.command, args.sources, args.out, workers=args.workers, **options)
    print(f"{report}\n{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
