"""demo.py in a browser: a request, an edit, a picture that is shown, a story, and an answer that is stopped."""

import shutil
import time

import pytest

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

import demo  # noqa: E402
from sample import load  # noqa: E402

PROGRAMS = [shutil.which(name) for name in ("chromium", "chromedriver")]
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
CHAT = '[aria-label="chatbot conversation"]'


@pytest.fixture(scope="module")
def session():
    return load(purpose="chat")


class Visitor:
    """Somebody with a browser of 1200 x 900 pixels."""

    def __init__(self, address: str):
        options = webdriver.ChromeOptions()
        options.binary_location = PROGRAMS[0]
        for flag in FLAGS:
            options.add_argument(flag)
        self.browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(PROGRAMS[1]))
        self.browser.set_window_size(1200, 900)
        self.browser.get(address)
        self.wait(lambda: self.all("textarea"))

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def wait(self, found, seconds: float = 120):
        end = time.monotonic() + seconds
        while not (result := found()):
            assert time.monotonic() < end, self.text()
            time.sleep(0.2)
        return result

    def text(self) -> str:
        """The chat, and errors that stand over it."""
        elements = f"document.querySelectorAll({CHAT!r} + ',.toast-body')"
        return self.browser.execute_script(f"return Array.from({elements}, e => e.innerText).join()")

    def described(self) -> int:
        """Finished pictures: what they show stands below them."""
        return len(self.all(".bot img") and self.all(".bot em"))

    def press(self, name: str) -> None:
        script = "Array.from(document.querySelectorAll('button, label')).find(e => e.innerText.trim() == arguments[0])"
        self.browser.execute_script(f"{script}.click()", name)

    def say(self, text: str) -> None:
        box = self.all("textarea")[0]
        box.click()
        box.send_keys(text + "\ue007")  # Enter


@pytest.fixture(scope="module")
def visitor(session, tmp_path_factory):
    if None in PROGRAMS:
        pytest.skip("no chromium with chromedriver")
    page = demo.build(session, tmp_path_factory.mktemp("demo"))
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    visitor = Visitor(address)
    yield visitor
    visitor.browser.quit()
    page.close()


def test_a_chat_and_a_story(visitor, tmp_path):
    visitor.say("draw a red boat at sea")
    visitor.wait(
        lambda: "and red" in visitor.text().partition("draw a red boat at sea")[2] and visitor.described() == 1
    )
    visitor.say("make it blue")
    visitor.wait(lambda: "and blue" in visitor.text().partition("make it blue")[2] and visitor.described() == 2)
    load().draw("a green tree in the snow").save(tmp_path / "tree.png")
    visitor.all("input[type=file]")[0].send_keys(str(tmp_path / "tree.png"))
    visitor.wait(lambda: visitor.all(".thumbnail-item img"))
    visitor.say("what do you see?")
    visitor.wait(lambda: "tree" in visitor.text().partition("what do you see?")[2])
    visitor.wait(lambda: not visitor.all(".generating"))
    visitor.press("New chat")
    visitor.wait(lambda: visitor.all("textarea") and not visitor.text().strip())
    visitor.press("Story")
    visitor.say("a pink kite flies over the meadow.")
    for count in (1, 2, 3):
        visitor.wait(lambda count=count: visitor.described() == count)
        visitor.wait(lambda: not visitor.all(".generating"))
        if count < 3:
            visitor.press("Next step")
    for width in (400, 1200):
        visitor.browser.set_window_size(width, 900)
        wide = visitor.browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, "the page is wider than the window"
        visitor.browser.save_screenshot(str(tmp_path / f"{width}.png"))


def test_nobody_waits(session):
    """The model stops at the next token or step when the page does not ask for more."""
    calls = []

    def work():
        for number in range(1000):
            calls.append(number)
            session.watch(ids=[])
            time.sleep(0.01)

    answer = demo.followed(session, work)
    assert next(answer) == []
    answer.close()
    time.sleep(0.2)
    count = len(calls)
    time.sleep(0.2)
    assert len(calls) == count < 100


def test_errors_reach_the_page(session):
    def work():
        raise ValueError("the prompt is too long")

    with pytest.raises(gradio.Error, match="too long"):
        list(demo.followed(session, work))
