"""A page to chat with MiniGPT-5: words and pictures in, words and pictures out.

    pip install -e '.[demo]'
    python demo.py                              # the miniature, at http://127.0.0.1:7860
    python demo.py --weights weights --checkpoint runs/stage-2

Words are shown as they come and pictures while they are denoised. A story begins with a sentence of yours and goes on
at every press of "Next step". Every visitor has a chat of their own; answers are made one after the other. The
page is for this machine alone unless --host says otherwise; it asks for no password.
"""

import argparse
import copy
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from common.cli import parse, run  # isort: skip

from PIL import Image

from common.images import read_image, to_image
from common.page import write_answer
from generation import Sampling, Segments
from sample import Session, load

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
except ImportError:
    gr = None

CHAT, STORY = "Chat", "Story"
PREVIEW_EVERY = 3  # denoising steps
LEAST_WIDTH = 256  # pixels; narrower pictures are enlarged on the page
EXAMPLES = [
    "a red boat on the sea at night",
    "draw a cat in the snow",
    "a yellow balloon and a small house in the mountains",
    "make it blue",
    "put it on the left",
    "add a white star",
    "now in the desert, please",
    "what do you see?",
]
ABOUT = """**MiniGPT-5** answers with words and pictures. The miniature knows balls, houses, trees, boats, fish, cars,
stars, flowers, cats, birds, balloons and kites, one or two in a picture, in red, orange, yellow, green, blue, purple,
pink and white, at sea, in the meadow, the snow, the city, the desert and the mountains, by day, at sunset and at
night."""


def image_part(picture: Image.Image) -> "gr.Image":
    """A picture as part of a message; a small one is enlarged without blur."""
    factor = -(-LEAST_WIDTH // picture.width)
    enlarged = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return gr.Image(enlarged, show_label=False, buttons=[])


def messages(segments: Segments) -> list[dict]:
    """An answer as the page's messages: texts, and pictures with their descriptions below them."""
    parts = []
    for segment in segments:
        if isinstance(segment, str):
            parts.append(segment)
        else:
            description = segment.info.get("description")
            parts += [image_part(segment), f"*{description}*"] if description else [image_part(segment)]
    return [{"role": "assistant", "content": part} for part in parts]


def stream(session: Session, work: Callable[[], Segments]) -> Iterator[Segments]:
    """Yields the unfinished answer again and again, and at last the whole one. `work` makes it in a thread, which stops
    at the next token or denoising step when this generator is closed."""
    events, stopped = queue.Queue(), threading.Event()

    def watch(ids: list[int] | None = None, done: int = 0, steps: int = 0, latents=None) -> None:
        if stopped.is_set():
            raise InterruptedError
        if ids is not None:
            words = session.model.tokenizer.decode(ids).removesuffix("###").strip()
            events.put([words] if words else [])
        elif done % PREVIEW_EVERY == 0:
            events.put(list(map(to_image, session.model.vae.decode(latents).float())))

    def make() -> None:
        try:
            events.put(work())
            events.put(None)
        except Exception as error:
            events.put(gr.Error(str(error), print_exception=not isinstance(error, ValueError)))

    session.watch = watch
    threading.Thread(target=make, daemon=True).start()
    try:
        while isinstance(event := events.get(), list):
            yield event
        if event:
            raise event
    finally:
        stopped.set()


def build(first: Session, folder: Path) -> "gr.Blocks":
    """The page. Chats are copies of `first` that share its model; their storyboards are written to `folder`."""

    def stream_answer(history, session, turns, guidance, steps, work):
        """Streams an answer below the history, then adds it to the turns and offers their storyboard."""
        session.sampling = replace(session.sampling, guidance=guidance, steps=int(steps))
        for segments in stream(session, work):
            yield history + messages(segments), session, turns, gr.skip()
        turns = [*turns, ("model", segments)]
        board = folder / str(id(session)) / "storyboard.png"
        write_answer(turns, "chat", 0, board.parent)
        yield gr.skip(), session, turns, gr.update(value=board if board.exists() else None)

    def say(message, history, session, turns, mode, seed, guidance, steps):
        text = message["text"].strip()
        if session is None:
            session = copy.copy(first)
            session.new(int(seed))
        try:
            pictures = tuple(read_image(Path(file)) for file in message["files"])
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        if not text and not pictures:
            yield history, session, turns, gr.skip()
            return
        history = history + [{"role": "user", "content": image_part(picture)} for picture in pictures]
        history = history + ([{"role": "user", "content": text}] if text else [])
        if session.words and (unknown := session.words.read(text)[1]):
            gr.Info(f"not in the miniature's world: {', '.join(unknown)}")
        if mode == STORY:
            session.begin(text, pictures)
        work = session.next_step if mode == STORY else lambda: session.chat(text, pictures)
        yield from stream_answer(history, session, [*turns, ("you", [text, *pictures])], guidance, steps, work)

    def go_on(history, session, turns, guidance, steps):
        if session is None or not session.turns:
            raise gr.Error("First choose Story and type its first sentence.", print_exception=False)
        yield from stream_answer(history, session, turns, guidance, steps, session.next_step)

    with gr.Blocks(title="MiniGPT-5", fill_height=True) as page:
        session, turns = gr.State(None), gr.State([])
        gr.Markdown(ABOUT)
        history = gr.Chatbot(show_label=False, scale=1, height=520, buttons=[])
        box = gr.MultimodalTextbox(placeholder="Ask for a picture, then for changes", show_label=False,
                                   file_types=["image"], file_count="multiple")  # fmt: skip
        with gr.Row():
            mode = gr.Radio([CHAT, STORY], value=CHAT, show_label=False, container=False, min_width=220)
            next_step = gr.Button("Next step")
            stop = gr.Button("Stop")
            new = gr.Button("New chat")
            board = gr.DownloadButton("Storyboard")
        gr.Examples([{"text": text, "files": []} for text in EXAMPLES], box, label="Try")
        with gr.Accordion("Settings", open=False):
            seed = gr.Number(0, label="Seed; set it before the first line", precision=0, minimum=0)
            guidance = gr.Slider(1, 15, first.sampling.guidance, step=0.5, label="Guidance scale; 1: off")
            steps = gr.Slider(5, 100, first.sampling.steps, step=1, label="Denoising steps of a picture")
        outputs, settings = [history, session, turns, board], [seed, guidance, steps]
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1}
        on_submit = box.submit(say, [box, history, session, turns, mode, *settings], outputs, **one_at_a_time)
        box.submit(lambda: None, None, box)
        on_next = next_step.click(go_on, [history, session, turns, guidance, steps], outputs, **one_at_a_time)
        stop.click(None, cancels=[on_submit, on_next])
        new.click(None, js="() => window.location.reload()")  # which also ends an answer in the making
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="trained parts: a file or a run's folder; default: of WEIGHTS/minigpt5")
    add("--int8", action="store_true", help="hold the language model's matrices in 8 bits")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every one of this machine's")
    add("--port", type=int, default=7860, help="port to listen at")
    args = parse(parser, "sample", Sampling, words_first=True)
    if gr is None:
        raise ValueError("gradio is not installed: pip install -e '.[demo]'")
    options = {name: getattr(args, name) for name in ("weights", "checkpoint", "device", "dtype", "int8")}
    session = load(purpose="chat", sampling=Sampling.of(vars(args)), **options)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from other servers
    with tempfile.TemporaryDirectory(prefix="minigpt5-") as folder:
        page = build(session, Path(folder))
        page.launch(server_name=args.host, server_port=args.port, share=False, theme=theme)


if __name__ == "__main__":
    run(main)
