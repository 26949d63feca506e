"""Human feedback (Section 3.3): a person picks the best of a pool, on a local page or by number.

`pick` serves page.html and the pool to the browser of the person at this machine and
waits for Done; `contact_sheets` and `parse_picks` are the way without a browser.
"""

import hashlib
import io
import json
import os
import re
import secrets
import sys
import threading
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

from styledrop import write_whole

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 64 * 1024                  # of a request's body: 1,920 numbers are 10 KB


class Picking:
    """The choice so far, on disk after every change, so that a reload or a restart goes on from it."""

    def __init__(self, images, prompts, path):
        self.count, self.prompts, self.path = len(images), list(prompts), Path(path)
        self.pool = hashlib.sha256(images.tobytes()).hexdigest()[:12]        # an old choice is of an old pool
        self.lock, self.done = threading.Lock(), threading.Event()
        self.chosen = []
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["pool"] == self.pool:
                self.chosen = self.check(saved["chosen"])
        except (OSError, ValueError, KeyError, TypeError):
            pass                                                             # nothing to go on from

    def check(self, chosen):
        """Sorted distinct indices. Raises ValueError if it is anything else than a list of them."""
        if not isinstance(chosen, list) or not all(type(i) is int and 0 <= i < self.count for i in chosen):
            raise ValueError(f"the choice must be a list of numbers from 0 to {self.count - 1}")
        return sorted(set(chosen))

    def choose(self, chosen):
        with self.lock:
            self.chosen = self.check(chosen)
            saved = json.dumps(dict(pool=self.pool, chosen=self.chosen)).encode()
            write_whole(self.path, lambda file: file.write(saved))


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass                                                # a closed tab; the terminal belongs to the training


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
                self.send_header("Content-Security-Policy", "default-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; "
                                                            "script-src 'unsafe-inline'; frame-ancestors 'none'")
            self.end_headers()
            self.wfile.write(body)

        def place(self):
            """The path behind the token; None, and an answer, for whoever does not know it."""
            try:
                host = urlsplit(f"//{self.headers.get('Host', '')}").hostname   # a tunnel may change the port
            except ValueError:
                host = None
            first, _, rest = urlsplit(self.path).path.lstrip("/").partition("/")
            if host not in ("127.0.0.1", "localhost", "::1") or not secrets.compare_digest(first.encode(), token.encode()):
                self.answer(403, b"open the address that the terminal shows")
                return None
            return rest

        def do_GET(self):
            place = self.place()
            if place is None:
                return
            picture = re.fullmatch(r"(pool|reference)/([0-9]{1,6})\.png", place)
            if place == "":
                self.answer(200, PAGE.read_bytes(), "text/html")
            elif place == "state":
                state = dict(prompts=picking.prompts, references=references, goal=goal, chosen=picking.chosen,
                             done=picking.done.is_set())
                self.answer(200, json.dumps(state).encode(), "application/json")
            elif picture and int(picture[2]) < (picking.count if picture[1] == "pool" else references):
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
                chosen = picking.check(json.loads(self.rfile.read(int(length))))
                if place == "done" and not chosen:
                    raise ValueError("choose at least one picture")
                if picking.done.is_set():
                    return self.answer(409, b"the choice is made")
                picking.choose(chosen)
            except (ValueError, RecursionError) as error:
                return self.answer(400, str(error).encode())
            self.answer(200, b"kept")
            if place == "done":
                picking.done.set()

        def log_message(self, *_):
            pass                                            # the terminal belongs to the training

    return Handler


def pick(images, prompts, reference, chosen_path, goal=10, port=0, open_browser=True, announce=print):
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

    server = Server(("127.0.0.1", port), handler(token, picking, png, len(reference), goal))
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/{token}/"
        announce(f"choose on this page: {address}")
        desktop = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if open_browser and desktop:                        # a text browser would take the terminal
            webbrowser.open(address)
        picking.done.wait()
    finally:
        server.shutdown()
        server.server_close()
    return picking.chosen


def contact_sheets(images, prompts, per_sheet=60):
    """Numbered sheets (PIL) of a pool: uint8 (B, H, W, 3) and B phrases; numbers count from 1, as --pick does."""
    columns, side, words = 10, 128, 28
    sheets = []
    for first in range(0, len(images), per_sheet):
        part = images[first:first + per_sheet]
        rows = -(-len(part) // columns)
        sheet = Image.new("RGB", (columns * (side + 6) + 6, rows * (side + words) + 6), "white")
        draw = ImageDraw.Draw(sheet)
        for i, image in enumerate(part):
            x, y = 6 + i % columns * (side + 6), 6 + i // columns * (side + words)
            draw.text((x, y), f"{first + i + 1}  {prompts[first + i]}"[:21], fill="black")
            sheet.paste(Image.fromarray(image).resize((side, side), Image.NEAREST), (x, y + 16))
        sheets.append(sheet)
    return sheets


def parse_picks(text, count):
    """ "3,17,20" or "1-4,9", counted from 1 -> sorted indices from 0. Raises ValueError for anything else."""
    chosen = set()
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= count:
            raise ValueError(f"cannot pick {part or 'nothing'!r}: give numbers in 1..{count}, such as 3,17,20 or 1-4")
        chosen.update(range(low - 1, high))
    return sorted(chosen)
