"""Human feedback (Section 3.3): a person picks the best of a pool, on a local page or by number.

`pick` serves page.html and the pool to the browser of the person at this machine and
waits for Done; `contact_sheets` and `parse_picks` are the way without a browser.
"""

import hashlib
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

from data.pictures import grid
from styledrop import write_whole

PAGE = Path(__file__).with_name("page.html")
POLICY = ("default-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; "
          "script-src 'unsafe-inline'; frame-ancestors 'none'")
MOST_BYTES = 1024                       # of a request's body


class Picking:
    """The choice so far, on disk after every change: a reload or a restart goes on from it.

    Raises ValueError where the file is damaged or holds a choice from another pool.
    """

    def __init__(self, images, prompts, path):
        self.count, self.prompts, self.path = len(images), list(prompts), Path(path)
        self.pool = hashlib.sha256(images.tobytes()).hexdigest()[:12]
        self.lock, self.done, self.chosen = threading.Lock(), threading.Event(), []
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            pool, chosen = saved["pool"], check_choice(saved["chosen"], math.inf)
            self.chosen = chosen if pool != self.pool else check_choice(chosen, self.count)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} is damaged; move it away to choose anew") from None
        if pool != self.pool and chosen:
            raise ValueError(f"{path} holds a choice from another pool; move it away")

    def change(self, number, chosen):
        """One picture in or out. Other tabs may have made other changes: the set lives here."""
        with self.lock:
            numbers = set(self.chosen) | {number} if chosen else set(self.chosen) - {number}
            numbers = check_choice(sorted(numbers), self.count)
            saved = json.dumps(dict(pool=self.pool, chosen=numbers)).encode()
            write_whole(self.path, lambda file: file.write(saved))
            self.chosen = numbers


def check_choice(chosen, count, name="the choice"):
    """Sorted distinct indices below count. Raises ValueError for anything but a list of them."""
    right = lambda i: type(i) is int and 0 <= i < count
    if not isinstance(chosen, list) or not all(map(right, chosen)):
        raise ValueError(f"{name} must be a list of numbers from 0 to {count - 1}")
    return sorted(set(chosen))


def read_change(body, count):
    """{"number": 7, "chosen": true} -> (7, True). Raises ValueError for anything else."""
    change = json.loads(body)
    if not isinstance(change, dict) or type(change.get("chosen")) is not bool:
        raise ValueError('a change is {"number": 7, "chosen": true}')
    return *check_choice([change.get("number")], count), change["chosen"]


def listen(port, handler=BaseHTTPRequestHandler):
    """A server on 127.0.0.1. Raises ValueError, in one line, where the port cannot be had."""
    try:
        return Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise ValueError(f"port {port} cannot be had ({error.strerror}); give another --port, "
                         "or none for any that is free") from None


def check_port(port):
    """Raise ValueError where the page could not be served on this port."""
    listen(port).server_close()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass                                                # a closed tab: not a matter of training


def handler(token, picking, png, references, goal):
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

        def place(self):
            """The path behind the token; None, and an answer, for whoever does not know it."""
            try:
                name = self.headers.get("Host", "")
                host = urlsplit(f"//{name}").hostname       # a tunnel may change the port
            except ValueError:
                host = None
            first, slash, rest = urlsplit(self.path).path.lstrip("/").partition("/")
            known = secrets.compare_digest(first.encode(), token.encode())
            if host not in ("127.0.0.1", "localhost", "::1") or not known:
                self.answer(403, b"open the address that the terminal shows")
                return None
            if not slash:                                    # the page's own links need it
                self.answer(302)
                return None
            return rest

        def do_GET(self):
            place = self.place()
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
            place = self.place()
            if place is None:
                return
            length = self.headers.get("Content-Length", "")
            if place not in ("choice", "done"):
                return self.answer(404, b"there is nothing here")
            if not re.fullmatch("[0-9]{1,12}", length):
                return self.answer(411, b"say how long the body is")
            if int(length) > MOST_BYTES:
                self.close_connection = True
                return self.answer(413, b"too long")
            try:
                body = self.rfile.read(int(length))
                if picking.done.is_set():
                    return self.answer(409, b"the choice is made")
                if place == "choice":
                    picking.change(*read_change(body, picking.count))
                elif not picking.chosen:
                    raise ValueError("choose at least one picture")
            except (ValueError, RecursionError) as error:
                return self.answer(400, str(error).encode())
            except OSError as error:                         # a full disk
                return self.answer(500, str(error.strerror).encode())
            self.answer_state()
            if place == "done":
                picking.done.set()

        def log_message(self, *_):
            pass                                            # the terminal belongs to the training

    return Handler


def pick(images, prompts, reference, chosen_path, goal=10, port=0, open_browser=True,
         announce=print):
    """Let a person choose in a browser -> sorted indices of the chosen pictures, at least one.

    images: uint8 (B, H, W, 3), the pool; prompts: the B phrases that made them; reference: uint8
    (R, H, W, 3); chosen_path: where the choice is kept while it grows; goal: how many the page
    asks for (the paper took ten). Serves 127.0.0.1 only, under an address with a random token,
    and returns when the person says Done. announce(line) is told the address.
    """
    picking, token = Picking(images, prompts, chosen_path), secrets.token_urlsafe(16)

    def png(kind, i):
        buffer = io.BytesIO()
        Image.fromarray((images if kind == "pool" else reference)[i]).save(buffer, "PNG")
        return buffer.getvalue()

    server = listen(port, handler(token, picking, png, len(reference), goal))
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/{token}/"
        announce(f"choose on this page: {address}")
        desktop = sys.platform in ("darwin", "win32") or any(
            os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
        if open_browser and desktop:                        # a text browser would take the terminal
            webbrowser.open(address)
        picking.done.wait()
    finally:
        server.shutdown()
        server.server_close()
    return picking.chosen


def contact_sheets(images, prompts, per_sheet=60):
    """A pool, uint8 (B, H, W, 3) and B phrases -> PIL sheets, numbered from 1, as --pick counts."""
    sheets = []
    for first in range(0, len(images), per_sheet):
        part = images[first:first + per_sheet]
        captions = [f"{first + i + 1}  {prompts[first + i]}" for i in range(len(part))]
        sheets.append(grid(part, 10, max(1, 128 // part.shape[1]), 6, captions=captions))
    return sheets


def parse_picks(text, count):
    """ "3,17,20" or "1-4,9", counted from 1 -> sorted indices from 0. Else raises ValueError."""
    chosen = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= count:
            raise ValueError(f"cannot pick {part or 'nothing'!r}: give numbers in 1..{count}, "
                             "such as 3,17,20 or 1-4")
        chosen.update(range(low - 1, high))
    return sorted(chosen)
