"""human_feedback/: the page in a real browser, what its server refuses, choosing by number."""

import hashlib
import http.client
import io
import json
import os
import shutil
import threading
import types
from importlib.util import find_spec
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from human_feedback import page as page_
from human_feedback import rounds
from human_feedback.choice import check_choice, contact_sheets, parse_picks
from human_feedback.page import ChoicePage, Picking, check_port

PROMPTS = ["a cat"] * 4 + ["a tree"] * 4 + ['an <owl> & "co"'] * 4
IMAGES = np.stack([np.full((16, 16, 3), 10 + 20 * i, np.uint8) for i in range(12)])
REFERENCE = np.full((1, 16, 16, 3), 99, np.uint8)
POOL = hashlib.sha256(IMAGES.tobytes()).hexdigest()[:12]


class Session:
    """A page whose command waits in a thread, and requests to it."""

    def __init__(self, path, open_browser=False):
        self.page = ChoicePage(IMAGES, PROMPTS, REFERENCE, path)
        self.address = self.page.address
        self.said, self.result = [], []
        self.thread = threading.Thread(target=self.wait, args=[open_browser], daemon=True)
        self.thread.start()

    def wait(self, open_browser):
        self.result.append(self.page.wait(open_browser, self.said.append))

    def ask(self, place="", body=None, root=None, headers=None):
        """Return status, headers and body of one request below the token."""
        url = urlsplit(self.address)
        if root is None:
            root = url.path
        connection = http.client.HTTPConnection(url.netloc, timeout=10)
        try:
            method = "GET" if body is None else "POST"
            connection.request(method, root + place, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def choose(self, *numbers, chosen=True):
        """One change after the other -> the choice with which the last one is answered."""
        for number in numbers:
            body = json.dumps(dict(number=number, chosen=chosen))
            status, _, answer = self.ask("choice", body)
            assert status == 200
        return json.loads(answer)["chosen"]

    @property
    def state(self):
        status, _, answer = self.ask("state")
        assert status == 200
        return json.loads(answer)

    def finish(self):
        """Done, by a request -> the command's result."""
        assert self.ask("done", "[1]")[0] == 200
        return self.wait_for_result()

    def wait_for_result(self):
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.result[0]


@pytest.fixture
def session(tmp_path):
    """session("picking.json") -> a page, which is closed in the end."""
    sessions = []

    def start(name="picking.json", **options):
        sessions.append(Session(tmp_path / name, **options))
        return sessions[-1]

    yield start
    for each in sessions:
        each.page.close()


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A page on which nothing is chosen, for requests that must change nothing."""
    one = Session(tmp_path_factory.mktemp("page") / "picking.json")
    yield one
    assert one.state["chosen"] == [] and one.thread.is_alive()
    assert not one.page.picking.path.exists()
    one.page.close()


# -- the server

def test_the_page_and_its_state(untouched):
    status, headers, page = untouched.ask()
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert b"http://" not in page and b"https://" not in page        # it needs no other server
    assert untouched.state == dict(prompts=PROMPTS, references=1, goal=10, chosen=[], done=False)
    assert untouched.said == [f"choose on this page: {untouched.address}"]


def test_pictures(untouched):
    for place, expected in (("pool/7.png", IMAGES[7]), ("reference/0.png", REFERENCE[0])):
        status, headers, png = untouched.ask(place)
        assert status == 200
        assert headers["Content-Type"].startswith("image/png")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), expected)


def test_an_address_without_its_last_slash(untouched):
    """Trap: an empty page, all of whose requests go astray."""
    root = urlsplit(untouched.address).path
    status, headers, _ = untouched.ask(root=root[:-1])
    assert status == 302
    assert headers["Location"] == root


def test_every_page_has_a_token_of_its_own(session):
    one, other = session(), session("other.json")
    assert urlsplit(one.address).hostname == "127.0.0.1"
    token = urlsplit(one.address).path.strip("/")
    assert len(token) >= 20
    assert token not in other.address


def test_the_choice_is_sorted_and_without_doubles(session):
    one = session()
    assert one.choose(7, 2, 7) == [2, 7]
    assert one.choose(9) == [2, 7, 9]
    assert one.choose(2, 3, chosen=False) == [7, 9]
    assert one.finish() == [7, 9]


def test_every_click_is_kept(session, tmp_path):
    """On disk at once, so that a restart continues it."""
    session().choose(7, 2)
    kept = json.loads((tmp_path / "picking.json").read_text())
    assert kept == dict(pool=POOL, chosen=[2, 7])
    again = session()
    assert again.state["chosen"] == [2, 7]
    assert again.choose(9) == [2, 7, 9]
    assert os.listdir(tmp_path) == ["picking.json"]


def test_a_choice_from_another_pool_is_not_continued(session, tmp_path):
    session().choose(7)
    before = (tmp_path / "picking.json").read_bytes()
    with pytest.raises(ValueError, match="contains a choice from another pool; move it away"):
        Picking(IMAGES + 1, PROMPTS, tmp_path / "picking.json")
    assert (tmp_path / "picking.json").read_bytes() == before


def test_after_done_every_tab_is_told(session):
    """A reload and a second tab get a state that says done, and their clicks change nothing."""
    one = session()
    one.choose(4)
    assert one.finish() == [4]
    assert one.state["done"] is True
    assert one.ask()[0] == 200
    assert one.ask("pool/7.png")[0] == 200
    assert one.ask("choice", json.dumps(dict(number=5, chosen=True)))[0] == 409
    assert one.ask("done", "")[0] == 409
    assert one.state["chosen"] == [4]


def test_a_full_disk_is_answered(session, monkeypatch):
    """The click is not kept, and the page is told."""
    one = session()
    one.choose(4)

    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(page_, "write_text", full)
    status, _, body = one.ask("choice", json.dumps(dict(number=5, chosen=True)))
    assert status == 500 and b"No space left" in body
    assert one.state["chosen"] == [4]


@pytest.mark.parametrize("place, body", [
    ("state", None), ("pool/0.png", None), ("done", ""),
    ("choice", '{"number": 1, "chosen": true}')])
def test_the_token_is_needed(untouched, place, body):
    """Without it, or with a wrong or a longer one: 403, and nothing changes."""
    root = urlsplit(untouched.address).path
    for wrong in ("", "/", "/wrong", root.lower() + "x/", root[:-2] + "/", "/%00/", "/%e9/"):
        assert untouched.ask(place, body, wrong)[0] == 403, wrong
    assert untouched.state["chosen"] == []


@pytest.mark.parametrize("host, status", [
    ("evil.example:80", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("[", 403),
    ("localhost:9000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200)])
def test_other_hosts_are_refused(untouched, host, status):
    """Trap: DNS rebinding. A tunnel may change the port."""
    assert untouched.ask("state", headers={"Host": host})[0] == status


@pytest.mark.parametrize("place", [
    "pool/12.png", "pool/-1.png", "pool/1.jpg", "pool/..%2f..%2fREADME.md", "../README.md",
    "reference/1.png", "x", "choice"])
def test_nothing_else_is_served(untouched, place):
    assert untouched.ask(place)[0] == 404


@pytest.mark.parametrize("body", [
    "", "x", "{}", "[1]", '{"number": 1}', '{"number": 1, "chosen": 1}', "[" * 999,
    '{"chosen": true, "number": -1}', '{"chosen": true, "number": 12}',
    '{"chosen": true, "number": "1"}', '{"chosen": true, "number": true}',
    '{"chosen": true, "number": 1.0}', '{"chosen": true, "number": [1]}',
    '{"chosen": true, "number": 1e400}'])
def test_bad_changes(untouched, body):
    assert untouched.ask("choice", body)[0] == 400
    assert untouched.state["chosen"] == []


def test_bad_requests(untouched):
    assert untouched.ask("done", "")[0] == 400                     # nothing is chosen
    assert untouched.ask("elsewhere", "[]")[0] == 404
    assert untouched.ask("choice", " " * 2000)[0] == 413
    assert untouched.ask("choice", "[1]", headers={"Content-Length": "-5"})[0] == 411
    assert untouched.thread.is_alive()


def test_a_port_in_use(untouched):
    port = urlsplit(untouched.address).port
    with pytest.raises(ValueError, match=f"^port {port} cannot be used .*give another --port"):
        check_port(port)


@pytest.mark.parametrize("platform, display, opens", [
    ("linux", ":0", True), ("linux", "", False), ("darwin", "", True), ("win32", "", True)])
def test_a_browser_opens_only_on_a_desktop(session, monkeypatch, platform, display, opens):
    """Trap: without a desktop, webbrowser starts a text browser inside the terminal."""
    opened = []
    monkeypatch.setattr(page_.webbrowser, "open", opened.append)
    monkeypatch.setattr(page_, "sys", types.SimpleNamespace(platform=platform))
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", display)
    one = session(open_browser=True)
    one.choose(4)
    assert one.finish() == [4]
    assert opened == ([one.address] if opens else [])


# -- files of a choice

OTHER_VALUES = [None, True, -1, 99, 10 ** 400, 1.5, float("nan"), "", "a\nb", "\ud800",
                "long" * 500, {}, [[]], [True], [1.0], ["1"], [12], [10 ** 400]]


def damages(whole):
    """The bytes of a JSON object that is cut, none at all, or lacks a value or has another one."""
    yield from (b"", b"[]", b"7", b"\xff\xfe", b"null", b"[" * 99_999, b"9" * 9_999)
    yield json.dumps(whole).encode()[:-1]
    for name in whole:
        rest = {other: whole[other] for other in whole if other != name}
        yield json.dumps(rest).encode()
        for value in OTHER_VALUES:
            yield json.dumps(whole | {name: value}).encode()


RECIPE = dict(prompts=["a cat"], pool=12, seed=0, feedback="human")


def read_picking(path):
    return Picking(IMAGES, PROMPTS, path).chosen


def read_choice(path):
    return rounds.read_choice(path, RECIPE, 12)


@pytest.mark.parametrize("whole, read", [
    (dict(pool=POOL, chosen=[2, 7]), read_picking), (dict(RECIPE, chosen=[2, 7]), read_choice)])
def test_a_damaged_choice_is_one_line(tmp_path, whole, read):
    """And the file stays as it is."""
    path = tmp_path / "choice.json"
    path.write_text(json.dumps(whole))
    assert read(path) == [2, 7]
    for content in damages(whole):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            read(path)
        message = str(error.value)
        assert str(tmp_path) in message
        assert "\n" not in message and len(message) < 400
        assert path.read_bytes() == content


def test_an_empty_choice():
    """It can be continued, but no adapter can be trained on it."""
    assert check_choice([], 12) == []
    assert check_choice([2, 2, 0], 12) == [0, 2]


def test_a_choice_without_pictures_is_refused(tmp_path):
    path = tmp_path / "choice.json"
    path.write_text(json.dumps(dict(RECIPE, chosen=[])))
    with pytest.raises(ValueError, match="contains no choice; move it away to choose anew"):
        read_choice(path)


def test_an_unreadable_choice_is_not_called_damaged(tmp_path, monkeypatch):
    """Its mode is 000, but tests run as root, who may read it."""
    path = tmp_path / "picking.json"
    path.touch()

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(io, "open", denied)
    with pytest.raises(ValueError, match="no permission to read .*picking.json; change"):
        read_picking(path)


# -- the page, in a browser

@pytest.fixture(scope="module")
def browser():
    """Chromium. .ci/run installs it and sets REQUIRE_BROWSER."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (find_spec("selenium") and binary and driver):
        assert "REQUIRE_BROWSER" not in os.environ, "chromium and selenium are asked for"
        pytest.skip("no chromium, chromedriver or selenium here")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-sync", "disable-background-networking", "disable-component-update",
                 "window-size=1100,800"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        chrome.implicitly_wait(10)
        yield chrome


def until(condition):
    """The first true value of condition(), within ten seconds."""
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(None, 10, poll_frequency=0.05).until(lambda _: condition())


def answer(browser, words, yes):
    """Answer the page's question when it comes."""
    from selenium.webdriver.support.expected_conditions import alert_is_present
    question = until(lambda: alert_is_present()(browser))
    assert words in question.text
    if yes:
        question.accept()
    else:
        question.dismiss()


def press(browser, *keys):
    from selenium.webdriver import ActionChains
    ActionChains(browser).send_keys(*keys).perform()


def cards(browser):
    return browser.find_elements("css selector", "main button")


def is_checked(card):
    return card.get_attribute("aria-checked") == "true"


def text_of(browser, name):
    """The text of an element, by its id."""
    return browser.find_element("id", name).text


ALL_LOADED = """return [...document.querySelectorAll('img')]
    .every(img => img.complete && img.naturalWidth === 16)"""


def open_page(browser, address):
    """Open the page and wait for all of its pictures."""
    browser.get_log("browser")                               # what other tests left there
    browser.get(address)
    until(lambda: len(cards(browser)) == 12 and browser.execute_script(ALL_LOADED))


def errors_of(browser):
    return [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_clicks(browser, session):
    one = session()
    open_page(browser, one.address)
    assert text_of(browser, "counter") == "0 of 10"
    assert not browser.find_element("id", "done").is_enabled()
    titles = [title.text for title in browser.find_elements("tag name", "h2")]
    assert titles == PROMPTS[::4]
    cards(browser)[5].click()
    cards(browser)[0].click()
    until(lambda: one.state["chosen"] == [0, 5])
    until(lambda: text_of(browser, "counter") == "2 of 10")
    assert len(browser.find_elements("css selector", "#tray button")) == 2
    assert not errors_of(browser)


def test_the_keyboard(browser, session):
    from selenium.webdriver import Keys
    one = session()
    open_page(browser, one.address)
    cards(browser)[0].click()
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, " ", Keys.ARROW_DOWN, Keys.ENTER)
    until(lambda: one.state["chosen"] == [0, 2, 6])          # 0 -> 1 -> 2, down to 6
    press(browser, Keys.ARROW_LEFT, " ", " ", Keys.ARROW_UP)
    until(lambda: one.state["chosen"] == [0, 2, 6])          # 5 was chosen, and then not
    assert browser.switch_to.active_element.get_attribute("data-number") == "2"


def test_a_reload_shows_the_choice(browser, session):
    one = session()
    one.choose(0, 2, 6)
    open_page(browser, one.address)
    browser.refresh()
    until(lambda: sum(map(is_checked, cards(browser))) == 3)


def test_done_asks_below_the_goal(browser, session):
    one = session()
    one.choose(0, 2, 6)
    open_page(browser, one.address)
    press(browser, "d")
    answer(browser, "3 of 10", yes=False)
    assert one.thread.is_alive() and not one.state["done"]
    press(browser, "d")
    answer(browser, "3 of 10", yes=True)
    assert one.wait_for_result() == [0, 2, 6]
    until(lambda: "Thank you" in text_of(browser, "end"))
    assert not errors_of(browser)


def test_a_reload_after_done_says_so(browser, session):
    """Trap: a tab that can still be clicked, or an error page, while the next round trains."""
    one = session()
    one.choose(4)
    open_page(browser, one.address)
    one.finish()
    browser.refresh()
    until(lambda: "Thank you" in text_of(browser, "end"))
    assert not browser.find_element("tag name", "main").is_displayed()
    assert not errors_of(browser)


def test_a_lost_server_is_reported(browser, session):
    """Trap: a click that was not kept looks kept."""
    one = session()
    open_page(browser, one.address)
    one.page.close()
    cards(browser)[0].click()
    until(lambda: "Is the command" in text_of(browser, "trouble"))
    assert not is_checked(cards(browser)[0])


def test_two_tabs(browser, session):
    """What another tab chose stays, and is seen after the next click; Done counts it too.

    Trap: each tab sends its whole set, and the older one undoes the newer.
    """
    one = session()
    open_page(browser, one.address[:-1])
    one.choose(*range(2, 11))
    cards(browser)[0].click()
    until(lambda: text_of(browser, "counter") == "10 of 10")
    one.choose(10, chosen=False)
    browser.find_element("id", "done").click()
    answer(browser, "9 of 10", yes=True)
    assert one.wait_for_result() == [0, *range(2, 10)]


# -- without a browser

def test_contact_sheets_show_every_picture():
    sheets = contact_sheets(IMAGES, PROMPTS, per_sheet=5)
    assert len(sheets) == 3
    for i in range(len(IMAGES)):
        x, y = 6 + i % 5 * 134, 6 + 16
        shown = np.asarray(sheets[i // 5])[y:y + 128, x:x + 128]
        assert (shown == IMAGES[i, 0, 0]).all()


def test_contact_sheets_count_on():
    """Trap: the second sheet counts from 1 again."""
    twice = np.concatenate([IMAGES[:5], IMAGES[:5]])
    one, two = contact_sheets(twice, ["a cat"] * 10, per_sheet=5)
    assert not np.array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.parametrize("text, chosen", [
    ("3,17,20", [2, 16, 19]), (" 20 ,3", [2, 19]), ("1-4,9", [0, 1, 2, 3, 8]), ("2-2,2", [1])])
def test_picks(text, chosen):
    assert parse_picks(text, 20) == chosen


@pytest.mark.parametrize("text", ["", "0", "21", "4-2", "1-", "-3", "a", "1,,2", "1-21", "\u0663"])
def test_wrong_picks(text):
    with pytest.raises(ValueError, match="numbers from 1 to 20, such as 3,17,20"):
        parse_picks(text, 20)
