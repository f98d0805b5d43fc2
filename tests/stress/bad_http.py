"""An HTTP server on this machine that does what servers should not. Used by fuzz.py."""

import http.server
import threading
import time
from random import Random

from bad_tars import BAD_TARS, member, pair_members, whole

BAD_SERVERS = (
    *("nothing", "404", "403 with a long page", "500", "503 once", "redirect", "redirect loop", "redirect to itself"),
    *("redirect to ftp", "redirect to a file", "redirect to nowhere", "cut once", "cut, no ranges", "cut always"),
    *("slow", "silent", "no answer", "no HTTP", "too long", "too short", "no length", "length is no number"),
    *("chunked", "chunked, cut", "chunk is a lie", "ranges are a lie", "changed in between", "long headers"),
    *("endless extended header", "bad tar", "bad tar", "bad tar"),
)
ENDLESS = {"endless extended header"}


class Server(http.server.ThreadingHTTPServer):
    """Answers /N/x.tar as `cases[N]`, (what is wrong, the tar, random numbers), says."""

    daemon_threads, request_queue_size = True, 50

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cases, self.asked = {}, {}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, number: int, what: str, rng: Random) -> str:
        tar = whole(pair_members())
        if what == "bad tar":
            tar = BAD_TARS[rng.choice(list(BAD_TARS))](rng, pair_members())
        elif what in ENDLESS:
            tar = member("h", b"1" * 512, rng.choice((b"L", b"x", b"g")), 2**40)
        self.cases, self.asked = {str(number): (what, tar, rng)}, {}
        return f"http://127.0.0.1:{self.server_port}/{number}/x.tar"

    def handle_error(self, *_):
        pass  # connections that were closed


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        number = self.path.split("/")[1]
        if number not in self.server.cases:
            return self.send_error(404)
        what, tar, rng = self.server.cases[number]
        self.server.asked[number] = asked = self.server.asked.get(number, 0) + 1
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        return self.answer(what, tar, start, asked, rng, f"/{number}/")

    def answer(self, what: str, tar: bytes, start: int, asked: int, rng: Random, place: str) -> None:
        if what == "redirect" and not self.path.endswith("/y.tar"):
            return self.head(rng.choice((301, 302, 307)), Location=place + "y.tar")
        if what == "redirect loop":
            return self.head(302, Location=f"{place}{asked}/x.tar")
        if what.startswith("redirect to"):
            other = {"itself": self.path, "ftp": "ftp://127.0.0.1:1/x.tar", "a file": "file:///etc/passwd"}
            return self.head(302, Location=other.get(what.removeprefix("redirect to "), "http://127.0.0.1:1/x.tar"))
        if (what == "503 once" and asked == 1) or what in ("404", "500"):
            return self.send_error(int(what[:3]))
        if what == "403 with a long page":
            self.head(403, reason="No\tentry " + "x" * 2000)
            return self.send(b"<html>\n" * 10_000)
        if what == "no answer":
            return None
        if what == "no HTTP":
            return self.send(
                rng.choice(
                    (
                        b"",
                        b"220 ftp ready\r\n",
                        b"HTTP/9 abc\r\n\r\n",
                        b"\0" * 100,
                        b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000,
                    )
                )
            )
        if what in ENDLESS:
            self.head(200)
            while self.send(tar + b"1" * (1 << 20)):
                tar = b""
            return None
        if what.startswith("chunk"):
            self.protocol_version = "HTTP/1.1"
            self.head(200, **{"Transfer-Encoding": "chunked", "Connection": "close"})
            return self.send(chunks(what, tar, rng))
        if start >= len(tar):
            return self.send_error(416)
        if what in ("cut, no ranges", "ranges are a lie") or (what == "bad tar" and rng.random() < 0.5):
            start = 0 if what != "ranges are a lie" or asked == 1 else rng.choice((0, 512))
        content, length = tar[start:], str(len(tar) - start)
        length = {"too long": str(len(content) * 2), "too short": str(len(content) // 2)}.get(what, length)
        if what == "length is no number":
            length = rng.choice(("-5", "abc", "1e9", "9" * 5000, "", "10, 20"))
        if what == "changed in between" and asked > 1:
            content = BAD_TARS["out of order"](rng, pair_members())[start:] + bytes(512)
            length = str(len(content))
        self.head(
            206 if "Range" in self.headers and (start or what == "ranges are a lie") else 200,
            **({} if what == "no length" else {"Content-Length": length}),
            **({"Content-Range": f"bytes {start}-{len(tar) - 1}/{len(tar)}"} if start else {}),
            **({f"X-{i}": "x" * 1000 for i in range(rng.choice((50, 200)))} if what == "long headers" else {}),
        )
        first = what in ("cut once", "ranges are a lie", "changed in between") and asked == 1
        if first or (what == "cut, no ranges" and asked < 3):
            content = content[: rng.randrange(1, len(content))]
        if what == "cut always":
            content = content[: 700 if start == 0 else 0]
        for i in range(0, len(content), 3 if what == "slow" else len(content)):
            if what == "slow" or (what == "silent" and i == 0):
                time.sleep(0.02)
            if not self.send(
                content[i : i + 3] if what == "slow" else content[: len(content) // (2 if what == "silent" else 1)]
            ):
                break
        if what == "silent":
            time.sleep(1)

    def head(self, status: int, reason: str | None = None, **headers: str) -> None:
        self.send_response(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, content: bytes) -> bool:
        """False where the other side has gone."""
        try:
            self.wfile.write(content)
            return True
        except OSError:
            return False


def chunks(what: str, tar: bytes, rng: Random) -> bytes:
    parts = [tar[i : i + 4096] for i in range(0, len(tar), 4096)]
    content = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    if what == "chunked, cut":
        return content[: rng.randrange(len(content))]
    if what == "chunk is a lie":
        return rng.choice((b"ffffffffffff\r\n", b"-5\r\n", b"zz\r\n", b"5" * 70_000, b"%x\r\n" % 2**70)) + content
    return content
