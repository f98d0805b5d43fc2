"""The options that say how answers are sampled. `sampling` is the class generation.Sampling: it has the defaults."""

import argparse


def add_picture_options(parser: argparse.ArgumentParser, sampling: type, against: str) -> None:
    add = parser.add_argument
    add("--steps", type=int, default=sampling.steps, help="denoising steps of a picture")
    add("--guidance", type=float, default=sampling.guidance, help=f"guidance against {against}; 1: off")
    add("--sampler", choices=sampling.samplers, default=sampling.sampler, help="diffusion sampler")


def add_sampling_options(parser: argparse.ArgumentParser, sampling: type, words_first: bool = False) -> None:
    """The fields of `Sampling` as options; --words-first only where `words_first`."""
    add = parser.add_argument
    add_picture_options(parser, sampling, against="vokens of zeros (see --empty-caption)")
    about = "guide against the empty caption, not against vokens of zeros; default: as trained"
    add("--empty-caption", action=argparse.BooleanOptionalAction, help=about)
    add("--temperature", type=float, default=sampling.temperature, help="of the words; 0: always the likeliest")
    add("--top-p", type=float, default=sampling.top_p, help="sample among the likeliest words of this mass; 1: off")
    add("--repetition-penalty", type=float, default=sampling.repetition_penalty, help="on words said before; 1: off")
    add("--max-new-tokens", type=int, default=sampling.max_new_tokens, help="longest answer, in tokens")
    add("--force-image", action="store_true", help="begin every answer with a picture")
    if words_first:
        about = "say in words what a picture shows, then paint that description"
        add("--words-first", action=argparse.BooleanOptionalAction, default=False, help=about)
