"""human_feedback: its page in a real browser; what its server refuses; picking by number."""

import http.client
import io
import json
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

import human_feedback
from human_feedback import contact_sheets, parse_picks, pick

PROMPTS = [prompt for prompt in ("a cat", "a tree", "an <owl> & \"co\"") for _ in range(4)]
IMAGES = np.stack([np.full((16, 16, 3), 10 + 20 * i, np.uint8) for i in range(len(PROMPTS))])
REFERENCE = np.full((1, 16, 16, 3), 99, np.uint8)


class Session:
    """`pick` in a thread; its address, and requests to it."""

    def __init__(self, path, images=IMAGES):
        self.result, addressed = [], threading.Event()

        def announce(line):
            self.address = line.split()[-1]
            addressed.set()

        work = lambda: self.result.append(
            pick(images, PROMPTS, REFERENCE, path, announce=announce, open_browser=False))
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert addressed.wait(10)
        parts = urlsplit(self.address)
        self.host, self.root = parts.netloc, parts.path

    def ask(self, place="", body=None, root=None, headers={}):
        """-> status, headers, body of one request below the token."""
        connection = http.client.HTTPConnection(self.host, timeout=10)
        try:
            connection.request("GET" if body is None else "POST",
                               (self.root if root is None else root) + place, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def choose(self, *numbers, chosen=True):
        """One change after the other -> the state that the last one is answered by."""
        for number in numbers:
            body = json.dumps(dict(number=number, chosen=chosen))
            status, _, answer = self.ask("choice", body)
            assert status == 200
        return json.loads(answer)

    @property
    def state(self):
        return json.loads(self.ask("state")[2])

    def finish(self):
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.result[0]


@pytest.fixture
def session(tmp_path):
    opened = []

    def start(name="picking.json", **more):
        opened.append(Session(tmp_path / name, **more))
        return opened[-1]

    yield start
    for one in opened:
        if one.thread.is_alive():
            one.choose(0)
            one.ask("done", "")
            one.finish()


# -- the server

def test_pictures_and_state(session):
    one = session()
    assert one.host.startswith("127.0.0.1:") and len(one.root.strip("/")) >= 20
    status, headers, page = one.ask()
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert b"http://" not in page and b"https://" not in page
    assert one.state == dict(prompts=PROMPTS, references=1, goal=10, chosen=[], done=False)
    for kind, source, i in (("pool", IMAGES, 7), ("pool", IMAGES, 0), ("reference", REFERENCE, 0)):
        status, headers, png = one.ask(f"{kind}/{i}.png")
        assert status == 200 and headers["Content-Type"].startswith("image/png")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), source[i])
    assert session("other.json").root != one.root


def test_choice_is_kept_and_returned(session, tmp_path):
    """Sorted, without doubles, on disk at once; Done returns it."""
    one = session()
    assert one.choose(7, 2, 7) == dict(chosen=[2, 7], done=False) and one.state["chosen"] == [2, 7]
    assert json.loads((tmp_path / "picking.json").read_text())["chosen"] == [2, 7]
    assert one.choose(9)["chosen"] == [2, 7, 9]
    assert one.choose(2, 3, chosen=False)["chosen"] == [7, 9]
    assert one.ask("done", "")[0] == 200 and one.finish() == [7, 9]
    assert os.listdir(tmp_path) == ["picking.json"]


def test_two_tabs_do_not_undo_each_other(session):
    """Changes, not states. Trap: each tab posts its whole set, and the older one wins."""
    one = session()
    one.choose(1)                                           # a tab that never hears of the other
    one.choose(8)
    one.choose(2)
    assert one.choose(1, chosen=False)["chosen"] == [2, 8]
    assert one.ask("done", "[1]")[0] == 200 and one.finish() == [2, 8]


def test_a_restart_goes_on(session):
    session().choose(3, 5)
    assert session().state["chosen"] == [3, 5]


def test_a_choice_of_another_pool_is_not_lost(session, tmp_path):
    session().choose(3)
    before = (tmp_path / "picking.json").read_bytes()
    with pytest.raises(ValueError, match="another pool"):
        pick(IMAGES + 1, PROMPTS, REFERENCE, tmp_path / "picking.json", open_browser=False)
    assert (tmp_path / "picking.json").read_bytes() == before


@pytest.mark.parametrize("damage", [
    "", "[]", "{", "7", '{"pool": 1}', '{"pool": "POOL", "chosen": [99]}', "[" * 99_999,
    '{"pool": "POOL", "chosen": "all"}'])
def test_a_damaged_choice_is_not_written_over(tmp_path, damage):
    pool = human_feedback.Picking(IMAGES, PROMPTS, tmp_path / "x").pool
    (tmp_path / "picking.json").write_text(damage.replace("POOL", pool))
    with pytest.raises(ValueError, match="picking.json is damaged") as error:
        pick(IMAGES, PROMPTS, REFERENCE, tmp_path / "picking.json", open_browser=False)
    assert "\n" not in str(error.value)


def test_address_without_its_last_slash(session):
    """Trap: an empty page, whose every request goes astray. Only who has the token is led on."""
    one = session()
    status, headers, _ = one.ask(root=one.root[:-1])
    assert status == 302 and headers["Location"] == one.root
    assert one.ask(root="/wrong")[0] == 403


def test_a_port_in_use_is_one_line(session, tmp_path):
    """With the port in it. Trap: "[Errno 98] Address already in use"."""
    port = int(session().host.split(":")[1])
    for use in (lambda: human_feedback.check_port(port),
                lambda: pick(IMAGES, PROMPTS, REFERENCE, tmp_path / "x", port=port)):
        with pytest.raises(ValueError, match=f"port {port} .*--port") as error:
            use()
        assert "\n" not in str(error.value)
    human_feedback.check_port(0)


def test_a_full_disk_is_answered(session, monkeypatch):
    """The click is not kept, and the page is told."""
    def full(*_):
        raise OSError(28, "No space left on device")
    one = session()
    one.choose(4)
    with monkeypatch.context() as patched:
        patched.setattr(human_feedback, "write_whole", full)
        status, _, body = one.ask("choice", '{"number": 5, "chosen": true}')
    assert status == 500 and b"No space" in body and one.state["chosen"] == [4]


def test_refuses_whoever_does_not_know_the_token(session, tmp_path):
    """Without the token, with a wrong or a longer one,
    or under another host's name (DNS rebinding): 403, nothing changed.
    """
    one = session()
    for root in ("/", "", "/wrong/", one.root.lower() + "x/", one.root[:-2] + "/",
                 "//" + one.root[1:-1] + "x/", "/%00/", "/%e9/"):
        for place, body in (("", None), ("state", None), ("pool/0.png", None), ("choice", "[1]"),
                            ("done", "[1]")):
            assert one.ask(place, body, root)[0] == 403, (root, place)
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "["):
        assert one.ask("state", headers={"Host": host})[0] == 403
    for host in ("localhost:9000", "127.0.0.1", "[::1]:8000"):              # a tunnel's other end
        assert one.ask("state", headers={"Host": host})[0] == 200
    assert one.state["chosen"] == [] and not (tmp_path / "picking.json").exists()


@pytest.mark.parametrize("place", [
    "pool/12.png", "pool/-1.png", "pool/1.jpg", "pool/..%2f..%2fREADME.md", "../README.md",
    "pool/../../README.md", "reference/1.png", "pool/9999999.png", "chosen.png", "x", "choice"
])
def test_nothing_outside_the_pool(session, place):
    assert session().ask(place)[0] == 404


def test_bad_bodies(session):
    one = session()
    for number in ("-1", "12", '"1"', "true", "1.0", "[1]", "null", "1e400", "NaN", "[" * 500):
        body = '{"chosen": true, "number": NUMBER}'.replace("NUMBER", number)
        assert one.ask("choice", body)[0] == 400, body
    for body in ("", "x", "{}", "[1]", "null", '{"number": 1}', '{"number": 1, "chosen": 1}',
                 '{"chosen": true}', "\u0000", "[" * 999):
        assert one.ask("choice", body)[0] == 400, body
    assert one.ask("done", "")[0] == 400 and one.ask("elsewhere", "[]")[0] == 404
    assert one.ask("choice", " " * 2000)[0] == 413
    assert one.ask("choice", "[1]", headers={"Content-Length": "-5"})[0] == 411
    assert one.ask("choice", "[1]", headers={"Transfer-Encoding": "chunked"})[0] in (400, 411)
    assert one.state["chosen"] == [] and one.thread.is_alive()


def test_browser_opens_only_on_a_desktop(tmp_path, monkeypatch):
    """Trap: without a desktop, webbrowser starts a text browser inside the terminal."""
    opened = []

    def browse(address):
        opened.append(address)
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
        path = urlsplit(address).path
        connection.request("POST", path + "choice", '{"number": 4, "chosen": true}')
        connection.getresponse().read()
        connection.request("POST", path + "done", "")
        connection.getresponse()

    monkeypatch.setattr(human_feedback.webbrowser, "open", browse)
    monkeypatch.setattr(human_feedback.sys, "platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    said = []
    assert pick(IMAGES, PROMPTS, REFERENCE, tmp_path / "a.json", announce=said.append) == [4]
    assert said[0].split()[-1] == opened[0]
    monkeypatch.delenv("DISPLAY")
    assert pick(IMAGES, PROMPTS, REFERENCE, tmp_path / "b.json",
                announce=lambda line: browse(line.split()[-1])) == [4]
    assert len(opened) == 2                                 # the second was ours


# -- the page, in a browser

@pytest.fixture(scope="module")
def browser():
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if not (webdriver and binary and driver):
        assert "REQUIRE_BROWSER" not in os.environ, "chromium and selenium are asked for"
        pytest.skip("no chromium, chromedriver or selenium here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic",
                 "--no-first-run", "--disable-sync", "--disable-background-networking",
                 "--disable-component-update", "--window-size=1100,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        chrome.implicitly_wait(10)
        yield chrome


def until(condition):
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(None, 10, poll_frequency=0.05).until(lambda _: condition())


def question(browser):
    """The page's question, when it comes."""
    from selenium.webdriver.support.ui import WebDriverWait
    from selenium.webdriver.support.expected_conditions import alert_is_present
    return WebDriverWait(browser, 10, poll_frequency=0.05).until(alert_is_present())


def cards(browser):
    return browser.find_elements("css selector", "main button")


def test_click_keyboard_reload_done(browser, session):
    from selenium.webdriver import ActionChains, Keys
    one = session()
    browser.get(one.address)
    counter, done = (browser.find_element("id", name) for name in ("counter", "done"))
    until(lambda: counter.text == "0 of 10" and len(cards(browser)) == 12)
    assert not done.is_enabled()
    assert [title.text for title in browser.find_elements("tag name", "h2")
            ] == ["a cat", "a tree", 'an <owl> & "co"']
    loaded = ("return [...document.querySelectorAll('img')]"
              ".every(img => img.complete && img.naturalWidth === 16)")
    until(lambda: browser.execute_script(loaded))

    cards(browser)[5].click()
    cards(browser)[0].click()
    until(lambda: one.state["chosen"] == [0, 5] and counter.text == "2 of 10")
    keys = lambda *pressed: ActionChains(browser).send_keys(*pressed).perform()
    # 0 -> 1 -> 2, down to 6
    keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, " ", Keys.ARROW_DOWN, Keys.ENTER)
    until(lambda: one.state["chosen"] == [0, 2, 5, 6])
    keys(Keys.ARROW_LEFT, " ", Keys.ARROW_UP)                                   # takes 5 back; on 1
    until(lambda: one.state["chosen"] == [0, 2, 6])
    assert browser.switch_to.active_element.get_attribute("data-number") == "2"
    assert len(browser.find_elements("css selector", "#tray button")) == 3

    browser.refresh()
    until(lambda: [card.get_attribute("aria-checked") for card in cards(browser)].count("true") ==
          3)
    keys("d")                                               # below the goal it asks
    asked = question(browser)
    assert "3 of 10" in asked.text
    asked.dismiss()
    assert one.thread.is_alive() and not one.state["done"]
    keys("d")
    question(browser).accept()
    assert one.finish() == [0, 2, 6]
    until(lambda: "Thank you" in browser.find_element("id", "end").text)
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_a_lost_server_is_said(browser, session):
    """A click that was not kept must not look kept."""
    one = session()
    browser.get(one.address)
    until(lambda: len(cards(browser)) == 12)
    until(lambda: browser.execute_script(
        "return [...document.images].every(image => image.complete && image.naturalWidth)"))
    one.choose(1)
    one.ask("done", "")
    one.finish()
    cards(browser)[0].click()
    until(lambda: "Not kept" in browser.find_element("id", "trouble").text)
    assert cards(browser)[0].get_attribute("aria-checked") == "false"
    browser.get_log("browser")


def test_two_tabs(browser, session):
    """What another tab chose stays, and is seen after the next click; Done counts it too."""
    one = session()
    browser.get(one.address[:-1])
    until(lambda: len(cards(browser)) == 12)
    one.choose(*range(2, 11))
    cards(browser)[0].click()
    until(lambda: browser.find_element("id", "counter").text == "10 of 10")
    one.choose(10, chosen=False)
    browser.find_element("id", "done").click()
    asked = question(browser)
    assert "9 of 10" in asked.text
    asked.accept()
    assert one.finish() == [0, *range(2, 10)]


@pytest.mark.parametrize("width", [1100, 360])
def test_nothing_spills_over_the_side(browser, session, width):
    browser.set_window_size(max(width, 500), 800)
    if width < 500:                                 # a window is no narrower than that; a device is
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                dict(width=width, height=720, deviceScaleFactor=1, mobile=True))
    browser.get(session(f"{width}.json").address)
    until(lambda: len(cards(browser)) == 12)
    cards(browser)[1].click()
    fits = "return document.documentElement.scrollWidth <= innerWidth && innerWidth"
    assert browser.execute_script(fits) == \
        browser.execute_script("return innerWidth") <= max(width, 500)
    if folder := os.environ.get("SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"page{width}.png"))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# -- without a browser

def test_contact_sheets():
    """Every picture once, in order, under its number.

    Trap: the second sheet counts from 1 again.
    """
    sheets = contact_sheets(IMAGES, PROMPTS, per_sheet=5)
    assert len(sheets) == 3
    for i in range(len(IMAGES)):
        sheet = np.asarray(sheets[i // 5])
        x, y = 6 + i % 5 * 134, 6 + 16
        assert (sheet[y:y + 128, x:x + 128] == IMAGES[i, 0, 0]).all()
    twin = contact_sheets(np.concatenate([IMAGES[:5], IMAGES[:5]]), PROMPTS[:1] * 10, per_sheet=5)
    assert not np.array_equal(np.asarray(twin[0]), np.asarray(twin[1]))


@pytest.mark.parametrize("text, chosen", [("3,17,20", [2, 16, 19]), (" 20 ,3", [2, 19]),
                                          ("1-4,9", [0, 1, 2, 3, 8]), ("2-2,2", [1]),
                                          ("1-20", list(range(20)))])
def test_picks(text, chosen):
    assert parse_picks(text, 20) == chosen


@pytest.mark.parametrize(
    "text", ["", ",", "0", "21", "4-2", "1-", "-3", "a", "1.5", "1,,2", "1-21", "\u0663"])
def test_bad_picks(text):
    with pytest.raises(ValueError, match=r"1\.\.20"):
        parse_picks(text, 20)
