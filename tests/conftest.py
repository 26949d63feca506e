"""Shared by all tests: a random base of toy size, its files, its adapters, and the commands.

"Trap:" in the docstring of a test names the mistake that the test would catch. A name in brackets
after it is the public repository in which that mistake was found, by its owner on GitHub.
"""

import functools
import inspect
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_feedback
import data
import muse as muse_
import pretrain.common
import styledrop
import vqgan as vqgan_
from adapter import Adapter
from checkpoint.adapters import TunedAdapter
from checkpoint.weights import save_model
from clip_feedback import CLIP, Tokenizer
from commandline import terminal
from commandline.terminal import run_command
from muse import SUPERRES, Muse
from pretrain.common import train_merges
from pretrain.vqgan import update_codes
from styledrop import StyleDrop
from vqgan import VQGAN

torch.set_num_threads(1)                # tensors of toy size gain nothing from a second thread

WORDS = ["a cat in watercolor painting style", "a house", "a tree", "a teapot", "an owl",
         "blurry flat vector"] * 3
VOCABULARY = sorted(set(" ".join(WORDS).split()))
TOKENIZER = Tokenizer(train_merges(WORDS, 100))
MERGES = [" ".join(pair) for pair in TOKENIZER.merges]       # as files of weights contain them


# -- toy models

def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise(module, std=0.2, seed=0):
    """Give every matrix of a module new weights, so large that each input matters."""
    chance = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.normal_(std=std, generator=chance)
    return module


def noise_images(count, side=16, seed=0):
    """Coarse random images (count, 3, side, side) in [-1, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=generator(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="nearest")


def seeded(make, seed=0):
    """make(), whose layers take their first weights from PyTorch's global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def toy_vqgan(seed=0):
    """A tokenizer whose codebook has seen one batch; before that, all codes are zero."""
    vqgan = seeded(lambda: VQGAN(vqgan_.PRESETS["toy"]), seed).eval()
    z = vqgan.encoder(noise_images(16, seed=seed)).detach()
    _, ids, _ = vqgan.quantizer(z)
    update_codes(vqgan.quantizer, z, ids, generator(seed))
    return vqgan


def toy_clip(seed=0):
    config = replace(clip_feedback.PRESETS["toy"], vocab_size=TOKENIZER.vocab_size)
    return randomise(seeded(lambda: CLIP(config, TOKENIZER), seed), 0.3).eval()


def toy_muse(seed=0, preset="toy", presets=muse_.PRESETS, **changes):
    """G and T of random weights, T with the vocabulary of TOKENIZER."""
    changes.setdefault("vocab_size", TOKENIZER.vocab_size)
    config = replace(presets[preset], **changes)
    muse = randomise(seeded(lambda: Muse(config), seed), seed=seed)
    return muse.eval().requires_grad_(False)


@pytest.fixture(scope="session", autouse=True)
def exact():
    """Compute in fp32 even where bf16 is fast, so that results are the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (styledrop, pretrain.common):
            patch.setattr(module, "fast_bf16", lambda device: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def drawings_once():
    """Every Art of the same sets and size shares its drawings, so the sheets are read once."""
    read = {}
    real = data.Art.__init__
    signature = inspect.signature(real)

    @functools.wraps(real)
    def init(self, *positional, **named):
        given = signature.bind(self, *positional, **named)
        given.apply_defaults()
        options = dict(given.arguments)
        del options["self"]
        chosen = str([options.pop(name) for name in ("sets", "role", "size", "kept_out")])
        if chosen not in read:
            real(self, *positional, **named)
            self.drawings.flags.writeable = False
            read[chosen] = dict(vars(self))
        vars(self).update(read[chosen])
        vars(self).update(options)

    data.Art.__init__ = init
    yield
    data.Art.__init__ = real


@pytest.fixture(scope="session", autouse=True)
def bases_once():
    """StyleDrop.load reads the files of a base once, since nothing ever changes its weights."""
    read = {}
    real = StyleDrop.load

    def load(weights=styledrop.WEIGHTS, device=None):
        chosen = [str(device)]
        for file in sorted(Path(weights).glob("*.pt")):
            status = file.stat()
            chosen.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
        key = tuple(chosen)
        if key not in read:
            read[key] = real(weights, device)
        return read[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StyleDrop, "load", load)
        yield


# -- a base, its files and its adapters

@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder of weights as pretraining writes it, untrained."""
    folder = tmp_path_factory.mktemp("weights")
    save_model(folder / "vqgan.pt", "vqgan", toy_vqgan(), {})
    save_model(folder / "clip.pt", "clip", toy_clip(), {}, merges=MERGES)
    save_model(folder / "muse.pt", "muse", toy_muse(), {}, merges=MERGES, words=VOCABULARY)
    return folder


@pytest.fixture(scope="session")
def pipe(weights):
    """The toy pipeline, of one stage. It is shared; tests that change it load their own."""
    return StyleDrop.load(weights, "cpu")


@pytest.fixture(scope="session")
def weights2(weights, tmp_path_factory):
    """The same weights and a second stage."""
    folder = tmp_path_factory.mktemp("weights2")
    for file in weights.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    second = toy_muse(presets=SUPERRES)
    save_model(folder / "superres.pt", "superres", second, {}, merges=MERGES)
    return folder


@pytest.fixture(scope="session")
def pipe2(weights2):
    """The toy pipeline of both stages."""
    return StyleDrop.load(weights2, "cpu")


@pytest.fixture(scope="session")
def make_adapter(pipe):
    """make_adapter(seed) -> an adapter that changes the toy base visibly.

    second: a seed for the second stage's adapter, which is otherwise left out.
    """
    def make(seed=0, style="watercolor painting", base=None, second=None):
        first_stage, second_stage = pipe.muse.config, SUPERRES["toy"]
        adapter = randomise(Adapter(first_stage.width, 4, first_stage.depth, True), 0.3, seed)
        superres = None
        if second is not None:
            superres = Adapter(second_stage.width, 4, second_stage.depth, False)
            randomise(superres, 0.3, second)
        about = dict(base=base or pipe.base_id, style=style)
        return TunedAdapter(adapter, superres, about).eval().requires_grad_(False)
    return make


@pytest.fixture
def picture(tmp_path):
    """picture("a.png") -> the path of a new picture of 20 x 16 pixels."""
    def make(name="ref.png", seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return str(tmp_path / name)
    return make


# -- commands

@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(main, *arguments) -> exit code, stdout and stderr of a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def run(main, *arguments):
        script = f"{main.__module__}.py"
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        try:
            run_command(main)
            code = 0
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    yield run
    signal.signal(signal.SIGTERM, handler)


def contents(folder):
    """{path in a folder: the bytes of the file, or None for a folder}."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def refused(cli, tmp_path):
    """refused(main, *arguments) -> the one line of an error with exit code 2. No file changes."""
    def run(main, *arguments):
        before = contents(tmp_path)
        code, _, err = cli(main, *arguments)
        assert code == 2, f"exit {code}:\n{err}"
        assert err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in err
        assert contents(tmp_path) == before
        return err
    return run


@pytest.fixture
def calls(monkeypatch):
    """calls(owner, name) -> a list of (positional, named) arguments of every call from now on."""
    def listen(owner, name):
        found = []
        real = getattr(owner, name)

        def noted(*positional, **named):
            found.append((positional, named))
            return real(*positional, **named)

        monkeypatch.setattr(owner, name, noted)
        return found
    return listen


class Clock:
    """A clock in place of the module time. It only runs when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now


@pytest.fixture
def slow_passes(monkeypatch):
    """slow_passes() -> a Clock that every pass of G moves by a second, from now on, and a list.

    The list takes the clock's time whenever a command says a line.
    """
    def start():
        clock, said = Clock(), []
        forward = Muse.forward

        def slow(*arguments, **named):
            clock.now += 1
            return forward(*arguments, **named)

        def say(words, stream=None):
            said.append(clock.now)

        monkeypatch.setattr(terminal, "time", clock)
        monkeypatch.setattr(terminal, "say", say)
        monkeypatch.setattr(Muse, "forward", slow)
        return clock, said
    return start
