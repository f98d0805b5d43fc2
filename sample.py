"""Ask MiniGPT-5: text and pictures in, text and pictures out.

    python sample.py --weights weights --prompt "a red boat on the sea at night"
    python sample.py --weights weights --prompt "what happens next?" --image a.jpg --image b.jpg --out out/story

Prints the answer and writes OUT/0.png, OUT/1.png ... and OUT/answer.json:
{"segments": [{"text": ...} | {"image": "0.png"}, ...], "seed": ..., "prompt": ...}.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from cli import DTYPES, make_folder, pick_device, run
from generation import Sampling, answer
from images import read_image, save_image
from llama import Tokenizer
from minigpt5 import load_minigpt5
from scheduler import SAMPLERS
from training import find_checkpoint

PICTURE = "<Img><ImageHere></Img>"


def build_prompt(tokenizer: Tokenizer, text: str, pictures: int) -> str:
    """The user's words as the stages were trained to read them: alone a caption, which stage 1 answers with a picture;
    after pictures, a turn of a conversation. Words that look like special tokens are taken as plain text."""
    text = tokenizer.plain(text)
    return f"###Human: {PICTURE * pictures} {text} ###Assistant:" if pictures else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", required=True, help="what to say to the model")
    add(
        "--image",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a picture before the prompt; repeatable",
    )
    add("--weights", type=Path, default=Path("weights"), help="folder of the published layout (README, Weights)")
    add("--checkpoint", type=Path, help="trained parts: a file or a run's folder; default: WEIGHTS/minigpt5")
    add("--out", type=Path, default=Path("out"), help="folder for the pictures and answer.json")
    add("--seed", type=int, default=0, help="same seed, same answer")
    add("--steps", type=int, default=50, help="denoising steps of a picture")
    add("--guidance", type=float, default=7.5, help="guidance against the zero-voken condition; 1: off")
    add("--sampler", choices=sorted(SAMPLERS), default="pndm")
    add("--temperature", type=float, default=1.0, help="of the words; 0: always the likeliest")
    add("--top-p", type=float, default=0.9, help="sample among the likeliest words of this mass; 1: off")
    add("--repetition-penalty", type=float, default=2.0, help="on words already said; 1: off")
    add("--max-new-tokens", type=int, default=256, help="longest answer")
    add("--force-image", action="store_true", help="begin the answer with a picture")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="auto", help="of the frozen weights; auto: bf16 on a GPU (README, Memory)")
    args = parser.parse_args()
    if not 0 < args.top_p <= 1 or args.temperature < 0 or args.repetition_penalty <= 0:
        parser.error("--top-p is in (0, 1], --temperature at least 0, --repetition-penalty above 0")
    if args.max_new_tokens < 1 or args.steps < 1:
        parser.error("--max-new-tokens and --steps are at least 1")

    pictures = [read_image(path) for path in args.image]
    out = make_folder(args.out)
    start = time.perf_counter()
    checkpoint = find_checkpoint(args.checkpoint or args.weights / "minigpt5")
    if checkpoint is None and args.checkpoint:
        raise ValueError(f"{args.checkpoint}: neither a checkpoint nor the folder of a run that has one")
    if checkpoint is None:
        torch.manual_seed(args.seed)
        print("no trained checkpoint found: the voken rows and the mapper are random, pictures will be noise")
    model = load_minigpt5(
        args.weights,
        checkpoint,
        dtype=DTYPES[args.dtype],
        device=pick_device(args.device),
        read_pictures=bool(pictures),
    ).eval()
    loaded = time.perf_counter()

    sampling = Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        max_new_tokens=args.max_new_tokens,
        force_image=args.force_image,
        sampler=args.sampler,
        steps=args.steps,
        guidance=args.guidance,
    )
    prompt = build_prompt(model.tokenizer, args.prompt, len(pictures))
    segments = answer(model, [prompt], [pictures], sampling, [torch.Generator().manual_seed(args.seed)])[0]

    described, painted = [], 0
    for segment in segments:
        if isinstance(segment, str):
            described.append({"text": segment})
            print(segment)
        else:
            name = f"{painted}.png"
            save_image(segment, out / name)
            described.append({"image": name})
            print(f"[{out / name}]")
            painted += 1
    record = {"segments": described, "seed": args.seed, "prompt": args.prompt}
    temporary = out / f".answer.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / "answer.json")
    print(
        f"loaded in {loaded - start:.1f} s, answered in {time.perf_counter() - loaded:.1f} s, see {out / 'answer.json'}"
    )


if __name__ == "__main__":
    run(main)
