"""The page on which a person chooses the best pictures of a pool (Section 3.3).

A small server on 127.0.0.1 shows page.html under an address with a random token. Every click is
kept on disk at once, so a reload, a second tab or a restart continues the same choice.
"""

import io
import json
import math
import os
import re
import secrets
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from checkpoint.files import read_json, write_text

from .choice import check_choice, hash_of

PAGE = Path(__file__).with_name("page.html")
POLICY = ("default-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'; frame-ancestors 'none'")
MOST_BYTES = 1024                       # of a request's body


class Picking:
    """The choice so far, on disk after every change.

    Raises ValueError if the file is damaged or contains a choice from another pool.
    """

    def __init__(self, images, prompts, path):
        self.count = len(images)
        self.prompts = list(prompts)
        self.path = Path(path)
        self.pool = hash_of(images)
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.chosen = []
        saved = read_json(self.path)
        if saved is None:
            return
        try:
            pool = saved["pool"]
            chosen = check_choice(saved["chosen"], math.inf)
            if pool == self.pool:
                chosen = check_choice(chosen, self.count)
        except (KeyError, ValueError):
            raise ValueError(f"{path} is damaged; move it away to choose anew") from None
        if pool != self.pool and chosen:
            raise ValueError(f"{path} contains a choice from another pool; move it away")
        self.chosen = chosen

    def change(self, number, chosen):
        """Select or deselect one picture. Other tabs may have made other changes."""
        with self.lock:
            numbers = set(self.chosen)
            if chosen:
                numbers.add(number)
            else:
                numbers.discard(number)
            numbers = check_choice(sorted(numbers), self.count)
            write_text(self.path, json.dumps(dict(pool=self.pool, chosen=numbers)))
            self.chosen = numbers


def read_change(body, count):
    """{"number": 7, "chosen": true} -> (7, True). Raises ValueError for anything else."""
    change = json.loads(body)
    if not isinstance(change, dict) or type(change.get("chosen")) is not bool:
        raise ValueError('a change is {"number": 7, "chosen": true}')
    number, = check_choice([change.get("number")], count)
    return number, change["chosen"]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Ignore errors such as a closed tab; they must not disturb the training."""


def listen(port, handler=BaseHTTPRequestHandler):
    """A server on 127.0.0.1.

    Raises ValueError, with a one-line message, if the port is not available.
    """
    try:
        return Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise ValueError(f"port {port} cannot be used ({error.strerror}); give another --port, "
                         "or leave it out for any free one") from None


def check_port(port):
    """Raise ValueError if the page could not be served on this port."""
    listen(port).server_close()


def handler_of(token, picking, png, references, goal):
    """The request handler of one pool. png(kind, i): the bytes of a picture."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=b"", kind="text/plain"):
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Content-Type-Options", "nosniff")
            if kind == "text/html":
                self.send_header("Content-Security-Policy", POLICY)
            if status == 302:
                self.send_header("Location", f"/{token}/")
            self.end_headers()
            self.wfile.write(body)

        def answer_state(self, **more):
            state = dict(chosen=picking.chosen, done=picking.done.is_set(), **more)
            self.answer(200, json.dumps(state).encode(), "application/json")

        def path_below_token(self):
            """The path after the token; None, after answering 403 or 302, if it is missing."""
            try:
                name = self.headers.get("Host", "")
                host = urlsplit(f"//{name}").hostname        # a tunnel may change the port
            except ValueError:
                host = None
            first, slash, rest = urlsplit(self.path).path.lstrip("/").partition("/")
            knows_token = secrets.compare_digest(first.encode(), token.encode())
            if host not in ("127.0.0.1", "localhost", "::1") or not knows_token:
                self.answer(403, b"open the address that the terminal shows")
                return None
            if not slash:                                    # the page's own links need it
                self.answer(302)
                return None
            return rest

        def do_GET(self):
            place = self.path_below_token()
            if place is None:
                return
            picture = re.fullmatch(r"(pool|reference)/([0-9]{1,6})\.png", place)
            counts = dict(pool=picking.count, reference=references)
            if place == "":
                self.answer(200, PAGE.read_bytes(), "text/html")
            elif place == "state":
                self.answer_state(prompts=picking.prompts, references=references, goal=goal)
            elif picture and int(picture[2]) < counts[picture[1]]:
                self.answer(200, png(picture[1], int(picture[2])), "image/png")
            else:
                self.answer(404, b"there is nothing here")

        def do_POST(self):
            place = self.path_below_token()
            if place is None:
                return
            length = self.headers.get("Content-Length", "")
            if place not in ("choice", "done"):
                self.answer(404, b"there is nothing here")
                return
            if not re.fullmatch("[0-9]{1,12}", length):
                self.answer(411, b"say how long the body is")
                return
            if int(length) > MOST_BYTES:
                self.close_connection = True
                self.answer(413, b"too long")
                return
            try:
                body = self.rfile.read(int(length))
                if picking.done.is_set():
                    self.answer(409, b"the choice is over")
                    return
                if place == "choice":
                    picking.change(*read_change(body, picking.count))
                elif not picking.chosen:
                    raise ValueError("choose at least one picture")
            except (ValueError, RecursionError) as error:
                self.answer(400, str(error).encode())
                return
            except OSError as error:                         # a full disk
                self.answer(500, str(error.strerror).encode())
                return
            self.answer_state()
            if place == "done":
                picking.done.set()

        def log_message(self, *_):
            """Print nothing: the terminal shows the training."""

    return Handler


def has_desktop():
    """Could a browser open a window here?

    Without a desktop, webbrowser might start a text-mode browser in this terminal.
    """
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class ChoicePage:
    """The page of one pool; it is served from now until `close`.

    It outlives the choice: a tab that is reloaded while the next round trains says that the choice
    is over.
    """

    def __init__(self, images, prompts, references, path, goal=10, port=0):
        """images: uint8 (B, H, W, 3), the pool; prompts: the B phrases that made them; references:
        uint8 (R, H, W, 3); path: where the choice is kept while it grows; goal: how many the page
        asks for (the paper took ten). Raises ValueError if the port cannot be used.
        """
        self.picking = Picking(images, prompts, path)
        token = secrets.token_urlsafe(16)

        def png(kind, i):
            buffer = io.BytesIO()
            pictures = images if kind == "pool" else references
            Image.fromarray(pictures[i]).save(buffer, "PNG")
            return buffer.getvalue()

        self.server = listen(port, handler_of(token, self.picking, png, len(references), goal))
        self.address = f"http://127.0.0.1:{self.server.server_port}/{token}/"
        threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True).start()

    def wait(self, open_browser=True, announce=print):
        """Announce the address, wait until the user clicks Done, and return the sorted indices."""
        announce(f"choose on this page: {self.address}")
        if open_browser and has_desktop():
            webbrowser.open(self.address)
        self.picking.done.wait()
        return self.picking.chosen

    def close(self):
        self.server.shutdown()
        self.server.server_close()
