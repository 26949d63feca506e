"""Shared by all tests: a random base at toy size, its weights, adapters, the two commands."""

import functools
import inspect
import signal
import sys
from dataclasses import replace

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
from clip_feedback import CLIP, Tokenizer
from muse import SUPERRES, Muse
from pretrain.common import train_merges
from pretrain.vqgan import update_codes
from commandline import run_command
from styledrop import StyleDrop, save_model
from vqgan import VQGAN

torch.set_num_threads(1)                # toy tensors gain nothing from a second thread

WORDS = ["a cat in watercolor painting style", "a house", "a tree", "a teapot", "an owl",
         "blurry flat vector"] * 3
VOCABULARY = sorted({word for line in WORDS for word in line.split()})
TOKENIZER = Tokenizer(train_merges(WORDS, 100))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shake(module, std=0.2, seed=0):
    """Every matrix of a module drawn anew, large enough that each input matters."""
    chance = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.normal_(std=std, generator=chance)
    return module


def noise_images(count, side=16, seed=0):
    """Coarse random pictures (count, 3, side, side) in [-1, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=generator(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="nearest")


def toy_vqgan(seed=0):
    """Its codebook has met one batch; before that, all codes are zero."""
    torch.manual_seed(seed)
    vqgan = VQGAN(vqgan_.PRESETS["toy"]).eval()
    z = vqgan.encoder(noise_images(16, seed=seed)).detach()
    update_codes(vqgan.quantizer, z, vqgan.quantizer(z)[1], generator(seed))
    return vqgan


def toy_clip(seed=0):
    torch.manual_seed(seed)
    config = replace(clip_feedback.PRESETS["toy"], vocab_size=TOKENIZER.vocab_size)
    return shake(CLIP(config, TOKENIZER), 0.3).eval()


def toy_muse(seed=0, preset="toy", presets=muse_.PRESETS, **changes):
    """G and T of random weights, T with the vocabulary of TOKENIZER."""
    changes = dict(vocab_size=TOKENIZER.vocab_size) | changes
    muse = shake(Muse(replace(presets[preset], **changes)), seed=seed)
    return muse.eval().requires_grad_(False)


def save_merges(tokenizer):
    return [" ".join(pair) for pair in tokenizer.merges]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """fp32, also where bf16 is fast: a test says the same on every machine."""
    for module in (styledrop, pretrain.common):
        monkeypatch.setattr(module, "fast_bf16", lambda device: False)


@pytest.fixture(scope="session", autouse=True)
def drawings_once():
    """The sheets are read once for each choice of sets and size; the other options are set anew."""
    real, read = data.Art.__init__, {}
    signature = inspect.signature(real)

    @functools.wraps(real)
    def init(self, *a, **k):
        given = signature.bind(self, *a, **k)
        given.apply_defaults()
        options = dict(list(given.arguments.items())[1:])
        key = str([options.pop(name) for name in ("sets", "role", "size")])
        if key not in read:
            real(self, *a, **k)
            self.drawings.flags.writeable = False
            read[key] = dict(vars(self))
        vars(self).update(read[key] | options)
    data.Art.__init__ = init
    yield
    data.Art.__init__ = real


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A weights folder as pretraining writes it, untrained."""
    folder, merges = tmp_path_factory.mktemp("weights"), save_merges(TOKENIZER)
    save_model(folder / "vqgan.pt", "vqgan", toy_vqgan(), {})
    save_model(folder / "clip.pt", "clip", toy_clip(), {}, merges=merges)
    save_model(folder / "muse.pt", "muse", toy_muse(), {}, merges=merges, words=VOCABULARY)
    return folder


@pytest.fixture(scope="session")
def pipe(weights):
    """The toy pipeline, of one stage. Shared: tests that change it take a copy."""
    return StyleDrop.load(weights, "cpu")


@pytest.fixture(scope="session")
def weights2(weights, tmp_path_factory):
    """The same with a second stage."""
    folder = tmp_path_factory.mktemp("weights2")
    for file in weights.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_model(folder / "superres.pt", "superres", toy_muse(preset="toy", presets=SUPERRES), {},
               merges=save_merges(TOKENIZER))
    return folder


@pytest.fixture(scope="session")
def pipe2(weights2):
    """The toy pipeline of both stages."""
    return StyleDrop.load(weights2, "cpu")


@pytest.fixture(scope="session")
def make_adapter(pipe):
    """make_adapter(seed) -> one of plain effect on the toy base; second: a seed for that stage."""
    def make(seed=0, style="watercolor painting", base=None, second=None):
        c, c2 = pipe.muse.config, SUPERRES["toy"]
        adapter = shake(Adapter(c.width, 4, c.depth, True), 0.3, seed)
        if second is not None:
            adapter.superres = shake(Adapter(c2.width, 4, c2.depth, False), 0.3, second)
        adapter.about = dict(base=base or pipe.base, style=style)
        return adapter.eval().requires_grad_(False)
    return make


@pytest.fixture
def picture(tmp_path):
    """picture("a.png") -> the path of a new 20 x 16 picture."""
    def make(name="ref.png", seed=0):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return str(tmp_path / name)
    return make


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(main, *arguments) -> exit code, stdout, stderr of a command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
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


@pytest.fixture
def calls(monkeypatch):
    """calls(owner, name) -> a list of (positional, named) arguments of every call from now on."""
    def listen(owner, name):
        found, real = [], getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *positional, **named: found.append(
            (positional, named)) or real(*positional, **named))
        return found
    return listen


@pytest.fixture
def refused(cli, tmp_path):
    """refused(main, *arguments): exit code 2, one line, which is returned, and no file left."""
    def run(main, *arguments):
        files = lambda: {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        before = files()
        code, _, err = cli(main, *arguments)
        assert code == 2 and err.endswith("\n") and err.count("\n") == 1, f"exit {code}:\n{err}"
        assert "Traceback" not in err and files() == before
        return err
    return run
