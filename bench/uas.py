"""One training step of stage 1 against the released code's way of doing it, on the same batches and random numbers.

    python bench/uas.py                                              # miniature; with a GPU also full size
    python bench/uas.py --sizes half --batch-size 2
    python bench/uas.py --sizes full --batch-size 8 --cap-gb 22 --gradient-checkpointing   # ours, in so much of a GPU

| contender         | what it does                                                                                    |
| ----------------- | ----------------------------------------------------------------------------------------------- |
| ours              | the step of train_uas.py: pictures encoded, captions read without gradient, one pass a batch    |
| ours, precomputed | the same from stored latents and caption encodings                                              |
| released recipe   | transformers, diffusers and torch.nn.Transformer; captions embedded and encoded one by one,     |
|                   | vokens gathered picture by picture, gradients through the whole sequence and of both whole      |
|                   | embedding tables, masked before AdamW; pictures encoded in every step; not compiled             |

In bfloat16 the released recipe runs under autocast, as released; on a GPU ours is compiled, as train_uas.py is. The
losses and gradients of all three are compared before anything is timed. A step starts with a batch in the host's memory
and ends with the optimiser's step. Memory is what a step needs above weights and moments; "reserved_gb" is all.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: not bench/, whose data.py and sample.py would hide the product's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import peers
from bench.common import Report, agree, alternate, exact_products, parser, peak_memory_of, rows_of, start
from bench.steps import GAMMA, Ours, make_batches, optimizer_of, step_of
from common.cli import read_arguments, run
from minigpt5 import CAP_WEIGHT, LDM_WEIGHT, TEXT_WEIGHT, MiniGPT5, Noise, send
from prompts import uas_texts
from published.parts import load_minigpt5
from trainer.compiled import checkpoint_gradients, compile_losses, count_graphs
from trainer.run import step_generator

BATCH = {"tiny": 2, "miniature": 8, "half": 2, "full": 16}


class Released(nn.Module):
    """What the released code does, in our words; starts from the trained parts of `model` and draws as it does."""

    def __init__(self, weights: Path, model: MiniGPT5, dtype: torch.dtype):
        super().__init__()
        device, self.dtype = model.device, dtype
        self.tokenizer, self.clip_tokenizer = model.tokenizer, model.clip_tokenizer
        self.llama = peers.peer_llama_with_vokens(weights, model.tokenizer, model.vokens, dtype)
        self.tables = [self.llama.get_input_embeddings().weight, self.llama.lm_head.weight]
        for table in self.tables:  # trained whole, in float32
            table.data = table.data.float()
            table.requires_grad_(True)
        self.mapper = peers.PeerMapper(model.mapper)
        self.text_encoder = peers.peer_text_encoder(weights, dtype, device)
        self.unet, self.vae = (peer(weights, dtype, device) for peer in (peers.peer_unet, peers.peer_vae))
        self.noise = diffusers.DDPMScheduler.from_pretrained(weights / "stable-diffusion" / "scheduler")
        self.optimizer = optimizer_of(self.tables, list(self.mapper.parameters()), fused=None)

    def read(self, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Captions, one after the other, to padded embeddings (B, T, D), mask and labels (B, T)."""
        table, tokenizer, samples = self.llama.get_input_embeddings(), self.tokenizer, []
        inner = tokenizer.voken_ids[1:-1]
        for caption in captions:
            source, target = (tokenizer.encode(text) for text in uas_texts(tokenizer.escape(caption)))
            ids = torch.tensor([tokenizer.bos_id, *source, *target], device=table.weight.device)
            labels = [-100] * (1 + len(source)) + [-100 if i in inner else i for i in target]
            samples.append((table(ids), torch.ones_like(ids), torch.tensor(labels, device=ids.device)))
        columns = zip(zip(*samples, strict=True), (0.0, 0, -100), strict=True)
        return tuple(nn.utils.rnn.pad_sequence(column, True, fill) for column, fill in columns)

    @torch.no_grad()
    def encode_caption(self, caption: str) -> Tensor:
        ids, mask = (t.to(self.tables[0].device) for t in self.clip_tokenizer([caption]))
        return self.text_encoder(ids, mask).last_hidden_state[0].float()

    def loss(self, batch: dict, draws: Noise) -> Tensor:
        embeddings, mask, labels = self.read(batch["captions"])
        whole = {"inputs_embeds": embeddings, "attention_mask": mask, "labels": labels}
        output = self.llama(**whole, output_hidden_states=True, use_cache=False)
        hidden, N = output.hidden_states[-1], len(self.tokenizer.voken_ids)
        features, captions = [], []
        for row, place in (labels == self.tokenizer.voken_ids[0]).nonzero().tolist():
            voken_states, caption = hidden[row, place - 1 : place - 1 + N].float(), batch["captions"][row]
            if draws.drop[row]:
                voken_states, caption = torch.zeros_like(voken_states), ""
            features.append(voken_states)
            captions.append(self.encode_caption(caption))
        mapped = self.mapper(torch.stack(features))
        caption_loss = F.mse_loss(mapped.float(), torch.stack(captions))
        image_loss = self.image_loss(mapped, batch["pixels"], draws)
        return TEXT_WEIGHT * output.loss + LDM_WEIGHT * image_loss + CAP_WEIGHT * caption_loss

    def image_loss(self, condition: Tensor, pixels: Tensor, draws: Noise) -> Tensor:
        steps = draws.timesteps
        with torch.no_grad():
            posterior = self.vae.encode(pixels.to(steps.device, self.dtype)).latent_dist
            latents = posterior.mean.float() + posterior.std.float() * draws.latent_noise
            latents = latents * self.vae.config.scaling_factor
            noisy = self.noise.add_noise(latents, draws.epsilon, steps)
        velocity = self.noise.config.prediction_type == "v_prediction"
        target = self.noise.get_velocity(latents, draws.epsilon, steps) if velocity else draws.epsilon
        predicted = self.unet(noisy.to(self.dtype), steps, condition.to(self.dtype)).sample.float()
        signal = self.noise.alphas_cumprod.to(steps.device)[steps]
        snr = signal / (1 - signal)
        weight = snr.clamp(max=GAMMA) / (snr + 1 if velocity else snr)
        return (weight * F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3))).mean()

    def backward(self, batch: dict, draws: Noise) -> Tensor:
        with torch.autocast(draws.epsilon.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.loss(batch, draws)
        loss.backward()
        for table in self.tables:  # all but the new rows
            table.grad[: self.tokenizer.base_vocabulary] = 0
        return loss.detach()

    def gradients(self) -> list[Tensor]:
        rows = [table.grad[self.tokenizer.base_vocabulary :] for table in self.tables]
        return [*rows, self.mapper.t2i_decoder_prompt.grad]


def losses_and_gradients(contender: Ours | Released, batch: dict, draws: Noise) -> list[Tensor]:
    loss = contender.backward(batch, draws)
    gradients = [gradient.clone() for gradient in contender.gradients()]
    contender.optimizer.zero_grad(set_to_none=True)
    return [loss, *gradients]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, ("miniature",))
    options.add_argument("--batch-size", type=int, help=f"default: {BATCH}")
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, help="ours; default: on a GPU")
    options.add_argument("--gradient-checkpointing", action="store_true", help="ours, as train_uas.py has it")
    options.add_argument("--cap-gb", type=float, help="ours alone, with no more than this much of the GPU's memory")
    args = read_arguments(options, argv)
    if args.batch_size is not None and args.batch_size < 1:
        options.error("--batch-size is at least 1")
    device, dtype = start(args)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    if args.cap_gb and device.type != "cuda":
        raise ValueError("--cap-gb is for a GPU")
    if args.cap_gb:
        torch.cuda.set_per_process_memory_fraction(args.cap_gb * 1e9 / torch.cuda.mem_get_info(device)[1], device)
    report = Report("uas", args, device)
    for size in args.sizes:
        with peers.weights_of(size, args) as weights:
            model = load_minigpt5(weights, None, 8, dtype, device, read_pictures=False, read_captions=True)
            batches = make_batches(model, args.batch_size or BATCH[size])
            if args.gradient_checkpointing:
                checkpoint_gradients(model)
            if compiled:
                compile_losses(model)
            precomputed = {"ours": False, "ours, precomputed": True}
            contenders = {name: Ours(model, flag, compiled) for name, flag in precomputed.items()}
            if not args.cap_gb:
                contenders["released recipe"] = Released(weights, model, dtype)
            measure(report, size, contenders, batches, model, args, dtype)


def measure(report: Report, size: str, contenders: dict, batches: list[dict], model, args, dtype) -> None:
    draws = send(model.sample_noise([0] * len(batches[0]["captions"]), [step_generator(1, 0, 0)]), model.device)
    with exact_products():
        results = {name: losses_and_gradients(contender, batches[0], draws) for name, contender in contenders.items()}
    figures = {name: agree(f"uas step, {name}", r, results["ours"], dtype, gradients=3) for name, r in results.items()}
    steps = {name: step_of(contender, batches, model) for name, contender in contenders.items()}
    for step in steps.values():
        for _ in batches:  # every length once
            step()
    before, samples = count_graphs(), len(batches[0]["captions"])
    times = alternate(steps, args.rounds, model.device, args.clock)
    more = {"batch": samples, "difference": max(figures.values()), "graphs_after_warmup": count_graphs() - before}
    if args.cap_gb:  # ours alone
        more["reserved_gb"] = torch.cuda.max_memory_reserved(model.device) / 1e9
    pairs = [("ours, precomputed", "ours"), *((name, "released recipe") for name in ("ours", "ours, precomputed"))]
    pairs = [pair for pair in pairs if pair[1] in times]
    for pair in pairs:
        report.add(rows_of("uas step", size, {name: times[name] for name in pair}, samples, "samples/s", **more))
    memory = {name: [peak_memory_of(step, model.device)] for name, step in steps.items()}
    for pair in pairs:
        report.add(rows_of("uas step, memory", size, {name: memory[name] for name in pair}, unit="GB", **more))


if __name__ == "__main__":
    run(main)
