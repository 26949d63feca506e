"""human_feedback: its page in a real browser; what its server refuses; picking by number."""

import contextlib
import hashlib
import http.client
import io
import json
import os
import shutil
import threading
from importlib.util import find_spec
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import human_feedback
from adapter import Adapter
from commandline import kind_of
from human_feedback import Picking, contact_sheets, parse_picks, pick, rounds

PROMPTS = [prompt for prompt in ("a cat", "a tree", "an <owl> & \"co\"") for _ in range(4)]
IMAGES = np.stack([np.full((16, 16, 3), 10 + 20 * i, np.uint8) for i in range(len(PROMPTS))])
REFERENCE = np.full((1, 16, 16, 3), 99, np.uint8)


class Session:
    """`pick` in a thread; its address, and requests to it."""

    def __init__(self, path, open_browser=False):
        self.result, addressed = [], threading.Event()
        announce = lambda line: (setattr(self, "address", line.split()[-1]), addressed.set())
        work = lambda: self.result.append(pick(
            IMAGES, PROMPTS, REFERENCE, path, announce=announce, open_browser=open_browser))
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert addressed.wait(10)
        self.host, self.root = urlsplit(self.address).netloc, urlsplit(self.address).path

    def ask(self, place="", body=None, root=None, headers={}):
        """-> status, headers, body of one request below the token."""
        connection = http.client.HTTPConnection(self.host, timeout=10)
        path = (self.root if root is None else root) + place
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        with contextlib.closing(connection):
            return answer.status, answer.headers, answer.read()

    def choose(self, *numbers, chosen=True):
        """One change after the other -> the choice that the last one is answered by."""
        for number in numbers:
            status, _, answer = self.ask("choice", json.dumps(dict(number=number, chosen=chosen)))
            assert status == 200
        return json.loads(answer)["chosen"]

    @property
    def state(self):
        return json.loads(self.ask("state")[2])

    def finish(self, done=True):
        """-> what `pick` returns; done False: after the page's own Done."""
        assert not done or self.ask("done", "[1]")[0] == 200
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.result[0]


@pytest.fixture
def session(tmp_path):
    return lambda name="picking.json", **more: Session(tmp_path / name, **more)


# -- the server

def test_pictures_and_state(session):
    """Trap: without the address's last slash an empty page, whose every request goes astray."""
    one = session()
    assert one.host.startswith("127.0.0.1:") and len(one.root.strip("/")) >= 20
    status, headers, page = one.ask()
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert b"http://" not in page and b"https://" not in page
    assert one.state == dict(prompts=PROMPTS, references=1, goal=10, chosen=[], done=False)
    for kind, source, i in (("pool", IMAGES, 7), ("reference", REFERENCE, 0)):
        status, headers, png = one.ask(f"{kind}/{i}.png")
        assert status == 200 and headers["Content-Type"].startswith("image/png")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), source[i])
    status, headers, _ = one.ask(root=one.root[:-1])
    assert status == 302 and headers["Location"] == one.root
    assert session("other.json").root != one.root


def test_choice_is_kept_and_returned(session, tmp_path):
    """Sorted, without doubles, on disk at once; a restart goes on, another pool does not. Changes,
    not states. Trap: each tab posts its whole set, and the older one undoes the newer.
    """
    assert session().choose(7, 2, 7) == [2, 7]              # a tab that hears of no other
    one = session()
    assert one.state["chosen"] == [2, 7] == json.loads(
        (tmp_path / "picking.json").read_text())["chosen"]
    assert one.choose(9) == [2, 7, 9] and one.choose(2, 3, chosen=False) == [7, 9]
    before = (tmp_path / "picking.json").read_bytes()
    with pytest.raises(ValueError, match="another pool"):
        Picking(IMAGES + 1, PROMPTS, tmp_path / "picking.json")
    assert (tmp_path / "picking.json").read_bytes() == before
    assert one.finish() == [7, 9] and os.listdir(tmp_path) == ["picking.json"]


def damages(whole):
    """The bytes of a JSON object that is cut, none at all, or lacks a value or has another one."""
    yield from (b"", b"[]", b"7", b"\xff\xfe", b"null", b"[" * 99_999, b"9" * 9_999)
    yield json.dumps(whole).encode()[:-1]
    others = [None, True, -1, 99, 10 ** 400, 1.5, float("nan"), "", "a\nb", "\ud800", "long" * 500,
              {}, [], [[]], [True], [1.0], ["1"], [2, 2, 0], [12], [10 ** 400]]
    for name in whole:
        yield json.dumps({other: whole[other] for other in whole if other != name}).encode()
        for value in others:
            yield json.dumps(whole | {name: value}).encode()


RECIPE = dict(prompts=["a cat"], pool=12, seed=0, feedback="human")
MADE = dict(kind="style", steps=50, content=["a house"], style="", base="1f")
POOL = hashlib.sha256(IMAGES.tobytes()).hexdigest()[:12]
READ = {"picking.json": (dict(pool=POOL, chosen=[2, 7]), 3,                # accepted: 3 of them all
                         lambda path: Picking(IMAGES, PROMPTS, path).chosen),
        "choice.json": (dict(RECIPE, chosen=[2, 7]), 2,
                        lambda path: rounds.read_choice(path, RECIPE, len(IMAGES))),
        "config.json": (dict(MADE, round=1), 23, lambda path: [                # any "round" will do
            int(rounds.made(path, MADE) and rounds.finished(path.parent, 1))])}


@pytest.mark.parametrize("name", READ)
def test_damaged_files(tmp_path, name):
    """What was written, or a choice from this pool, or one line; the file stays."""
    (whole, good, read), path, accepted = READ[name], tmp_path / name, []
    Adapter(8, 1, 1, True).save(tmp_path / "adapter.pt")
    for written in (json.dumps(whole).encode(), *damages(whole)):
        path.write_bytes(written)
        kind_of(tmp_path)                                    # sample.py: raises nothing
        try:
            chosen = read(path)
            assert all(type(i) is int and 0 <= i < 12 for i in chosen) and chosen == sorted(chosen)
            accepted.append(chosen)
        except ValueError as error:
            line = str(error)
            assert str(tmp_path) in line and "\n" not in line and len(line) < 400, line
        assert path.read_bytes() == written
    assert accepted[0] == whole.get("chosen", [1]) and len(accepted) == good


def test_a_full_disk_is_answered(session, monkeypatch):
    """The click is not kept, and the page is told."""
    one = session()
    one.choose(4)
    with monkeypatch.context() as patched:
        patched.setattr(human_feedback, "write_whole", mock.Mock(side_effect=OSError(28, "Full")))
        status, _, body = one.ask("choice", '{"number": 5, "chosen": true}')
    assert status == 500 and b"Full" in body and one.state["chosen"] == [4]


def test_refuses_whoever_does_not_know_the_token(session, tmp_path):
    """Without the token, with a wrong or a longer one, or under another host's name (DNS
    rebinding): 403, nothing changed. And nothing outside the pool is served.
    """
    one = session()
    for root in ("", "/", "/wrong", one.root.lower() + "x/", one.root[:-2] + "/", "/%00/", "/%e9/"):
        for place, body in (("state", None), ("pool/0.png", None), ("done", ""),
                            ("choice", '{"number": 1, "chosen": true}')):
            assert one.ask(place, body, root)[0] == 403, (root, place)
    for status, hosts in ((403, ("evil.example:80", "127.0.0.1.evil.example", "", "[")),
                          (200, ("localhost:9000", "127.0.0.1", "[::1]:8000"))):     # a tunnel's
        for host in hosts:
            assert one.ask("state", headers={"Host": host})[0] == status, host
    for place in """pool/12.png pool/-1.png pool/1.jpg pool/..%2f..%2fREADME.md ../README.md
            reference/1.png x choice""".split():
        assert one.ask(place)[0] == 404, place
    assert one.state["chosen"] == [] and not (tmp_path / "picking.json").exists()


def test_bad_bodies(session):
    one = session()
    numbers = ("-1", "12", '"1"', "true", "1.0", "[1]", "1e400", "[" * 500)
    for body in ["", "x", "{}", "[1]", '{"number": 1}', '{"number": 1, "chosen": 1}', "[" * 999,
                 *(f'{{"chosen": true, "number": {number}}}' for number in numbers)]:
        assert one.ask("choice", body)[0] == 400, body
    assert one.ask("done", "")[0] == 400 and one.ask("elsewhere", "[]")[0] == 404
    assert one.ask("choice", " " * 2000)[0] == 413
    assert one.ask("choice", "[1]", headers={"Content-Length": "-5"})[0] == 411
    assert one.state["chosen"] == [] and one.thread.is_alive()


@pytest.mark.parametrize("desktop", [True, False])
def test_browser_opens_only_on_a_desktop(session, monkeypatch, desktop):
    """Trap: without a desktop, webbrowser starts a text browser inside the terminal."""
    opened = []
    monkeypatch.setattr(human_feedback.webbrowser, "open", opened.append)
    monkeypatch.setattr(human_feedback.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0" if desktop else "")
    one = session(open_browser=True)
    one.choose(4)
    assert one.finish() == [4] and opened == [one.address] * desktop


# -- the page, in a browser

@pytest.fixture(scope="module")
def browser():
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (find_spec("selenium") and binary and driver):
        assert "REQUIRE_BROWSER" not in os.environ, "chromium and selenium are asked for"
        pytest.skip("no chromium, chromedriver or selenium here")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in """headless=new no-sandbox disable-gpu disable-quic no-first-run disable-sync
            disable-background-networking disable-component-update window-size=1100,800""".split():
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        chrome.implicitly_wait(10)
        yield chrome


def until(condition):
    """Its first true value, within ten seconds."""
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(None, 10, poll_frequency=0.05).until(lambda _: condition())


def answer(browser, words, yes):
    """Answer the page's question when it comes."""
    from selenium.webdriver.support.expected_conditions import alert_is_present
    asked = until(lambda: alert_is_present()(browser))
    assert words in asked.text
    asked.accept() if yes else asked.dismiss()


def cards(browser):
    return browser.find_elements("css selector", "main button")


def open_page(browser, address):
    """-> the text of an element by its id; when all pictures are there."""
    browser.get(address)
    loaded = ("return [...document.querySelectorAll('img')]"
              ".every(img => img.complete && img.naturalWidth === 16)")
    until(lambda: len(cards(browser)) == 12 and browser.execute_script(loaded))
    return lambda name: browser.find_element("id", name).text


def test_click_keyboard_reload_done(browser, session):
    from selenium.webdriver import ActionChains, Keys
    one = session()
    shown = open_page(browser, one.address)
    assert shown("counter") == "0 of 10" and not browser.find_element("id", "done").is_enabled()
    assert [title.text for title in browser.find_elements("tag name", "h2")] == PROMPTS[::4]
    cards(browser)[5].click()
    cards(browser)[0].click()
    until(lambda: one.state["chosen"] == [0, 5] and shown("counter") == "2 of 10")
    keys = lambda *pressed: ActionChains(browser).send_keys(*pressed).perform()
    # 0 -> 1 -> 2, down to 6
    keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, " ", Keys.ARROW_DOWN, Keys.ENTER)
    until(lambda: one.state["chosen"] == [0, 2, 5, 6])
    keys(Keys.ARROW_LEFT, " ", Keys.ARROW_UP)               # takes 5 back; on 1
    until(lambda: one.state["chosen"] == [0, 2, 6])
    assert browser.switch_to.active_element.get_attribute("data-number") == "2"
    assert len(browser.find_elements("css selector", "#tray button")) == 3

    browser.refresh()
    until(lambda: sum(card.get_attribute("aria-checked") == "true" for card in cards(browser)) == 3)
    for yes in (False, True):                               # below the goal it asks
        assert one.thread.is_alive() and not one.state["done"]
        keys("d")
        answer(browser, "3 of 10", yes)
    assert one.finish(done=False) == [0, 2, 6]
    until(lambda: "Thank you" in shown("end"))
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_a_lost_server_is_said(browser, session):
    """A click that was not kept must not look kept."""
    one = session()
    shown = open_page(browser, one.address)
    one.choose(1)
    one.finish()
    cards(browser)[0].click()
    until(lambda: "Not kept" in shown("trouble"))
    assert cards(browser)[0].get_attribute("aria-checked") == "false"
    browser.get_log("browser")


def test_two_tabs(browser, session):
    """What another tab chose stays, and is seen after the next click; Done counts it too."""
    one = session()
    shown = open_page(browser, one.address[:-1])
    one.choose(*range(2, 11))
    cards(browser)[0].click()
    until(lambda: shown("counter") == "10 of 10")
    one.choose(10, chosen=False)
    browser.find_element("id", "done").click()
    answer(browser, "9 of 10", True)
    assert one.finish(done=False) == [0, *range(2, 10)]


# -- without a browser

def test_contact_sheets():
    """Each picture in order, under its number. Trap: the second sheet counts from 1 again."""
    sheets = contact_sheets(IMAGES, PROMPTS, per_sheet=5)
    assert len(sheets) == 3
    for i in range(len(IMAGES)):
        x, y = 6 + i % 5 * 134, 6 + 16
        assert (np.asarray(sheets[i // 5])[y:y + 128, x:x + 128] == IMAGES[i, 0, 0]).all()
    twin = contact_sheets(np.concatenate([IMAGES[:5], IMAGES[:5]]), PROMPTS[:1] * 10, per_sheet=5)
    assert not np.array_equal(np.asarray(twin[0]), np.asarray(twin[1]))


@pytest.mark.parametrize("text, chosen", [
    ("3,17,20", [2, 16, 19]), (" 20 ,3", [2, 19]), ("1-4,9", [0, 1, 2, 3, 8]), ("2-2,2", [1])])
def test_picks(text, chosen):
    assert parse_picks(text, 20) == chosen


@pytest.mark.parametrize("text", ["", "0", "21", "4-2", "1-", "-3", "a", "1,,2", "1-21", "\u0663"])
def test_no_picks(text):
    with pytest.raises(ValueError, match=r"1\.\.20"):
        parse_picks(text, 20)
