"""checkpoint/: files are whole or not there, weights fit or are refused, and no code is run."""

import gzip
import io
import math
import os
import pickle
import platform
import random
import re
import shutil
import stat
import subprocess
import types
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
from conftest import MERGES, TOKENIZER, contents, noise_images, seeded
from PIL import Image

import clip_feedback
import muse
import vqgan
from adapter import Adapter
from checkpoint.adapters import TunedAdapter, load_adapter
from checkpoint.clip import load_clip
from checkpoint.files import (LEAST_FREE, check_place, clear_leftovers, partial_prefix, read_json,
                              write_json, write_log, write_png, write_whole)
from checkpoint.runs import alone, is_finished, kind_of, load_run, newest_run, was_made
from checkpoint.weights import build, fingerprint, load_model, make_config, read_weights, save_model
from clip_feedback import CLIP, OPENAI_PIXELS, PRESETS, VOCABULARY_FILE, text_score
from vqgan import VQGAN, VQGANConfig

VIT = dict(vision_layers=2, vision_width=32, vision_heads=2)         # the other kind of image tower


def one_line(words):
    """A pattern of a message of one line with some words in it."""
    return f"^[^\n]*{words}[^\n]*$"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------
# Files

def test_write_whole_replaces_a_file(tmp_path):
    path = tmp_path / "new" / "file"
    write_whole(path, lambda file: file.write(b"old"))
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert names_in(path.parent) == ["file"]


def test_an_interrupted_write_changes_nothing(tmp_path):
    """Trap: a kill in the middle of torch.save costs the old checkpoint as well."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert contents(tmp_path) == {"file": b"old"}


def write_weights(path):
    weights = dict(weights=torch.zeros(10_000))
    write_whole(path, lambda file: torch.save(weights, file))


def write_picture(path):
    write_png(path, Image.effect_noise((99, 99), 50))


def write_config(path):
    write_json(path, dict(steps=[7] * 2000))


def write_steps(path):
    write_log(path, [dict(step=1)] * 2000)


every_writer = pytest.mark.parametrize("write", [write_weights, write_picture, write_config,
                                                 write_steps])


@every_writer
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_respect_the_umask(tmp_path, write, umask, mode):
    """Trap: temporary files are private, and stay so for a user who wants to share them."""
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


class FullDisk(io.RawIOBase):
    """A file on a disk with 3,000 bytes left, whose errors do not say which file it is."""

    def __init__(self):
        self.left = 3000

    def writable(self):
        return True

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return len(data)


@every_writer
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, write):
    """Also where torch.save hides the system's error behind one of its own."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr("builtins.open", lambda *_: FullDisk())
    with pytest.raises(OSError, match="No space left") as error:
        write(path)
    monkeypatch.undo()
    assert error.value.filename == str(path)
    assert contents(tmp_path) == {"file": b"old"}


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """Those of a dead process of this machine go at the next write.

    What a live process has there stays, and so does what belongs to another machine (perhaps of a
    longer name) or to another program.
    """
    dead = subprocess.Popen(["true"])
    dead.wait()
    node = platform.node()
    kept = [f"{partial_prefix()}a", f".partial-{node}-1-a", f".partial-other-{dead.pid}-a",
            f".partial-{node}-{dead.pid}-77-a", f".partial-{node}-2-{dead.pid}-a",
            f".partial-{node}-b-{dead.pid}-a", f".partial-{node}-", "adapter.pt", ".partial"]
    for name in (*kept, f".partial-{node}-{dead.pid}-file"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f".partial-{node}-{dead.pid}-folder" / "run").mkdir(parents=True)
    write_whole(tmp_path / "new", lambda file: None)
    assert names_in(tmp_path) == sorted([*kept, "new"])


def test_a_process_of_another_user_is_alive(tmp_path, monkeypatch):
    (tmp_path / f".partial-{platform.node()}-77-a").touch()

    def denied(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", denied)
    clear_leftovers(tmp_path)
    assert names_in(tmp_path) == [f".partial-{platform.node()}-77-a"]


# -- before a long command

def with_free_space(monkeypatch, size):
    usage = types.SimpleNamespace(total=2 ** 40, used=0, free=size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize("place, is_folder", [
    ("new", True), ("new", False), ("new/deep/run", True), ("folder", True), ("text.txt", False)])
def test_a_place_that_can_be_written(tmp_path, monkeypatch, place, is_folder):
    """It is left as it was."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").touch()
    with_free_space(monkeypatch, LEAST_FREE)
    check_place(tmp_path / place, is_folder=is_folder)
    assert names_in(tmp_path) == ["folder", "text.txt"]


@pytest.mark.parametrize("place, reason", [
    ("text.txt/run", "file exists|not a directory"), (f"new/{'a' * 300}", "name too long"),
    ("link", "broken link")])
def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, place, reason):
    """One line that names the path, the reason and the option."""
    (tmp_path / "text.txt").touch()
    (tmp_path / "link").symlink_to("missing")
    with_free_space(monkeypatch, LEAST_FREE)
    with pytest.raises(ValueError, match=one_line(f"{tmp_path / place}.*({reason}).*--trace")):
        check_place(tmp_path / place, "--trace")
    assert names_in(tmp_path) == ["link", "text.txt"]


@pytest.mark.parametrize("place", ["new/run", "run"])
def test_a_full_disk_is_noticed_first(tmp_path, monkeypatch, place):
    (tmp_path / "run").mkdir()
    with_free_space(monkeypatch, LEAST_FREE - 1)
    with pytest.raises(ValueError, match=one_line(f"{tmp_path / place}.*no space left.*--out")):
        check_place(tmp_path / place)


@pytest.mark.parametrize("place, is_folder, reason", [
    ("text.txt", True, "is a file, not a folder"), ("folder", False, "is a folder, not a file")])
def test_a_place_of_the_other_kind(tmp_path, place, is_folder, reason):
    """Trap: it is noticed when the work is done."""
    (tmp_path / "text.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=one_line(f"{tmp_path / place} {reason}; .*--trace")):
        check_place(tmp_path / place, "--trace", is_folder=is_folder)


# -- JSON

def test_json_round_trip(tmp_path):
    value = dict(style="größer", seeds=[1, 2], content=None)
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert read_json(tmp_path / "missing.json") is None


def test_too_little_memory_is_not_called_damage(tmp_path, monkeypatch):
    """Trap: "train it again" where there was no memory left to read the file."""
    def no_memory(*_, **__):
        raise MemoryError

    torch.save({}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(MemoryError):
        read_weights(tmp_path / "a.pt")
    with pytest.raises(MemoryError):
        build(no_memory, {})


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"\xff\xfe", b"null", b"[" * 99_999,
                                     b"9" * 9_999, b'{"a": 1'])
def test_damaged_json_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=one_line(f"{path} is damaged; move {path} away")):
        read_json(path)


def deny_reading(monkeypatch, path):
    """Opening one file fails as it does with mode 000. Tests run as root, who may read it."""
    real = io.open

    def opened(file, *arguments, **named):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(file, *arguments, **named)

    monkeypatch.setattr(io, "open", opened)


@pytest.mark.parametrize("name, read", [
    ("config.json", read_json), ("adapter.pt", load_adapter), ("clip.pt", load_clip)])
def test_an_unreadable_file_is_not_called_damaged(tmp_path, monkeypatch, name, read):
    path = tmp_path / name
    path.touch()
    deny_reading(monkeypatch, path)
    with pytest.raises(ValueError, match=one_line(f"no permission to read {path}; change")):
        read(path)


# --------------------------------------------------------------------------------------------------
# Weights

def test_fingerprint_knows_every_tensor(pipe):
    """Trap: with a digest of names or shapes alone, any base of this size passes."""
    state = pipe.muse.state_dict()
    copy = {name: tensor.clone() for name, tensor in state.items()}
    assert fingerprint(copy) == fingerprint(state)
    found = {fingerprint(state)}
    for name, tensor in state.items():
        other = tensor.clone()
        other.flatten()[0] += 1e-3
        found.add(fingerprint(state | {name: other}))
    assert len(found) == 1 + len(state)


def test_model_round_trip(tmp_path):
    """In half precision; what is read is fp32, frozen and in eval mode."""
    model = seeded(lambda: VQGAN(vqgan.PRESETS["toy"])).half().float()
    path = tmp_path / "vqgan.pt"
    save_model(path, "vqgan", model, dict(seed=0), words=["cat"])
    loaded, saved = load_model(path, "vqgan", VQGANConfig, VQGAN)
    assert loaded.config == model.config
    assert saved["provenance"] == dict(seed=0) and saved["words"] == ["cat"]
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
        assert loaded.state_dict()[name].dtype == weight.dtype
    with pytest.raises(ValueError, match=one_line("is not a file of kind 'muse'")):
        load_model(path, "muse", VQGANConfig, VQGAN)


TOO_LARGE = [
    (PRESETS["toy"], dict(vision_layers=10 ** 9)), (PRESETS["toy"], dict(vision_layers=())),
    (PRESETS["toy"], dict(vision_layers=(2,) * 9)), (PRESETS["toy"], dict(vision_layers=(1, 257))),
    (PRESETS["toy"], dict(vision_width=2.0)), (PRESETS["toy"], dict(text_width=-1)),
    (PRESETS["toy"], dict(vocab_size=2 ** 40)), (PRESETS["toy"], dict(text_heads=0)),
    (PRESETS["toy"], dict(text_heads=5)), (PRESETS["toy"], dict(embed_dim=True)),
    (PRESETS["toy"], dict(quick_gelu=1)), (PRESETS["toy"], dict(image_mean="abc")),
    (PRESETS["toy"], dict(image_std=(math.nan,) * 3)), (muse.PRESETS["toy"], dict(heads=3)),
    (vqgan.PRESETS["toy"], dict(blocks=300)), (vqgan.PRESETS["toy"], dict(channels=()))]


@pytest.mark.parametrize("config, change", TOO_LARGE, ids=[str(change) for _, change in TOO_LARGE])
def test_sizes_that_no_model_has_are_refused(config, change):
    """Trap: a damaged file of a few bytes asks for all memory."""
    name, = change
    with pytest.raises(ValueError, match=one_line(f"its {name} is ")):
        make_config(type(config), asdict(config) | change)


@pytest.mark.parametrize("values", [None, 7, [1], {"colour": 1}, {7: 1}], ids=str)
def test_a_config_of_another_kind_is_refused(values):
    with pytest.raises(ValueError, match=one_line("does not fit this version")):
        make_config(VQGANConfig, values)


@pytest.mark.parametrize("presets", [PRESETS, muse.PRESETS, muse.SUPERRES, vqgan.PRESETS],
                         ids=["clip", "muse", "superres", "vqgan"])
def test_sizes_of_our_presets_are_allowed(presets):
    for config in presets.values():
        assert make_config(type(config), asdict(config)) == config


WEIGHT = torch.ones(3, 2)
BAD_WEIGHTS = {
    "missing": None,
    "integers": WEIGHT.int(),
    "sparse": WEIGHT.to_sparse(),
    "NaN": WEIGHT * math.nan,
    "infinite in fp32": WEIGHT.double() * 1e300,
    "less memory than it claims": WEIGHT[:1].clone().expand(3, 2),
    "without memory": WEIGHT.to("meta"),
    "another shape": WEIGHT[1:]}


def linear():
    return torch.nn.Linear(2, 3)


def test_weights_that_fit():
    layer = build(linear, dict(weight=WEIGHT, bias=torch.ones(3)))
    assert torch.equal(layer.weight, WEIGHT)
    assert not layer.training


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_named(fault):
    weights = dict(weight=BAD_WEIGHTS[fault], bias=torch.ones(3))
    with pytest.raises(ValueError, match=one_line("'weight'")):
        build(linear, weights)


def test_unknown_weights_are_named():
    weights = dict(weight=WEIGHT, bias=torch.ones(3), more=torch.ones(1))
    with pytest.raises(ValueError, match=one_line("'more'")):
        build(linear, weights)


class Command:
    """What runs os.mkdir(path) when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("read", [read_weights, load_adapter, load_clip])
def test_no_code_of_a_pickle_is_run(tmp_path, read):
    """Trap: a stranger's adapter does what it likes when it is opened."""
    target = tmp_path / "written"
    path = tmp_path / "adapter.pt"
    path.write_bytes(pickle.dumps(Command(str(target))))
    with pytest.raises(ValueError, match=one_line("is damaged, or was not written by torch.save")):
        read(path)
    torch.save(dict(kind="adapter", config=Command(str(target))), path)
    with pytest.raises(ValueError, match=one_line("is damaged, or was not written by torch.save")):
        read(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()                                   # the command does work


@pytest.mark.filterwarnings("ignore")                        # TorchScript warns of its own age
@pytest.mark.parametrize("read", [read_weights, load_adapter, load_clip])
def test_no_code_of_a_torchscript_archive_is_run(tmp_path, monkeypatch, read):
    path = tmp_path / "ViT.pt"
    torch.jit.script(torch.nn.Identity()).save(str(path))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("its code was run"))
    with pytest.raises(ValueError, match=one_line(f"{path} is a TorchScript archive; it contains")):
        read(path)


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    """Trap: a small file that fills all memory."""
    path = tmp_path / "clip.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"0" * 10 ** 6)
    with pytest.raises(ValueError, match=one_line("is compressed")):
        read_weights(path)


def test_a_damaged_size_is_not_called_compression(saved_adapter, tmp_path):
    """One byte of the archive's directory is changed."""
    content = bytearray(saved_adapter.read_bytes())
    content[content.index(b"PK\1\2") + 27] ^= 1             # of an entry's size
    path = tmp_path / "adapter.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=one_line("is damaged")):
        read_weights(path)


@pytest.mark.parametrize("name", ["missing.pt", "."])
def test_there_is_no_such_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no file of weights at"):
        read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="no adapter file at"):
        load_adapter(tmp_path / name)


# --------------------------------------------------------------------------------------------------
# Adapters

@pytest.fixture(scope="module")
def saved_adapter(pipe2, make_adapter, tmp_path_factory):
    """The path of an adapter file of both stages."""
    path = tmp_path_factory.mktemp("run") / "adapter.pt"
    make_adapter(base=pipe2.base_id, second=0).save(path)
    return path


@pytest.mark.parametrize("second", [None, 5], ids=["one stage", "both stages"])
def test_adapter_round_trip(make_adapter, tmp_path, second):
    """From the file or from its folder. Trap: the second stage's weights are lost or new."""
    adapter = make_adapter(second=second)
    adapter.save(tmp_path / "adapter.pt")
    for path in (tmp_path, tmp_path / "adapter.pt"):
        again = load_adapter(path)
        assert again.about == adapter.about
        assert again.adapter.config == adapter.adapter.config
        assert (again.superres is None) == (second is None)
        assert fingerprint(again.state_dict()) == fingerprint(adapter.state_dict())
        assert not any(p.requires_grad for p in again.parameters())


def read_or_refuse(path, load):
    """The model in a file, or None where it is refused in one line that names the file."""
    try:
        model = load(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message and len(message) < 400
        return None
    assert all(p.isfinite().all() for p in model.parameters())
    if load is load_adapter:
        assert all(isinstance(model.about.get(name, ""), str) for name in ("base", "style"))
    return model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("load, count", [(load_adapter, 300), (load_clip, 150)])
def test_randomly_damaged_files(saved_adapter, weights, tmp_path, capfd, load, count):
    """Bytes replaced, inserted, or cut off: a model, or one line, and nothing on the terminal.

    Two thirds of the places are near an end, where the archive's own structure lies.
    """
    source = saved_adapter if load is load_adapter else weights / "clip.pt"
    whole = source.read_bytes()
    chance = random.Random(0)
    path = tmp_path / "adapter.pt"
    accepted = dict.fromkeys(["replaced", "cut", "inserted"], 0)
    for i in range(count):
        low, high = [(0, len(whole)), (0, 3000), (len(whole) - 2000, len(whole))][i // 3 % 3]
        place = chance.randrange(low, high)
        new = chance.randbytes(chance.choice([1, 300]))
        how = list(accepted)[i % 3]
        if how == "replaced":
            damaged = whole[:place] + new + whole[place + len(new):]
        elif how == "cut":
            damaged = whole[:place]
        else:
            damaged = whole[:place] + new + whole[place:]
        path.write_bytes(damaged)
        if read_or_refuse(path, load) is not None:
            accepted[how] += 1
    assert 0 < accepted["replaced"] < count / 3              # padding, or another digit of a weight
    assert accepted["cut"] == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("load", [load_adapter, load_clip])
def test_files_of_other_kinds(weights, tmp_path, load):
    path = tmp_path / "adapter.pt"
    for content in (b"", b"hello", b"PK\x03\x04" + b"\1" * 99, (weights / "muse.pt").read_bytes()):
        path.write_bytes(content)
        assert read_or_refuse(path, load) is None


WRONG = [None, 7, -1, math.nan, 10 ** 30, True, "x", b"x", [], [1], {1: 2}, {"style": 7},
         {"base": None}, torch.zeros(3), torch.zeros(2, 2).to_sparse(), torch.float16]


@pytest.mark.parametrize("field", ["kind", "about", "config", "superres", "weights"])
def test_wrong_types_in_an_adapter(saved_adapter, tmp_path, field):
    """Traps: missing keys are filled with random weights; a traceback."""
    saved = torch.load(saved_adapter, weights_only=True)
    path = tmp_path / "adapter.pt"
    wrong = WRONG
    if field == "about":                                     # any dict will do, and so will []
        wrong = [None, 7, True, "x", [1], {"style": 7}, {"base": None}, torch.zeros(3)]
    for value in wrong:
        torch.save(saved | {field: value}, path)
        assert read_or_refuse(path, load_adapter) is None, value
    del saved[field]
    torch.save(saved, path)
    assert read_or_refuse(path, load_adapter) is None


@pytest.mark.parametrize("field", ["config", "superres", "weights"])
def test_wrong_types_inside_of_a_field(saved_adapter, tmp_path, field):
    saved = torch.load(saved_adapter, weights_only=True)
    path = tmp_path / "adapter.pt"
    for name in list(saved[field])[:3]:
        for value in (*WRONG, torch.full((32, 4), math.nan)):
            torch.save(saved | {field: saved[field] | {name: value}}, path)
            assert read_or_refuse(path, load_adapter) is None, (name, value)


@pytest.mark.parametrize("name, value", [("base", 7), ("style", 7), ("style", "x" * 2001)])
def test_base_and_style_are_text(saved_adapter, tmp_path, name, value):
    """Traps: a number as a style phrase is a traceback when a prompt is made of it; a phrase of
    millions of letters takes minutes to read.
    """
    saved = torch.load(saved_adapter, weights_only=True)
    saved["about"][name] = value
    torch.save(saved, tmp_path / "adapter.pt")
    assert read_or_refuse(tmp_path / "adapter.pt", load_adapter) is None


# --------------------------------------------------------------------------------------------------
# CLIP weights

def toy(**changes):
    config = replace(PRESETS["toy"], vocab_size=TOKENIZER.vocab_size, **changes)
    return seeded(lambda: CLIP(config, TOKENIZER)).eval()


@pytest.mark.parametrize("tower", [{}, VIT], ids=["ResNet", "ViT"])
def test_clip_round_trip_is_exact(tower, tmp_path):
    clip = toy(**tower).half().float()
    path = tmp_path / "clip.pt"
    save_model(path, "clip", clip, {}, merges=MERGES)        # in fp16
    loaded = load_clip(path)
    assert loaded.config == clip.config
    assert loaded.tokenizer.merges == TOKENIZER.merges
    assert not loaded.training
    for name, weight in clip.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    through_the_old_name = clip_feedback.load_clip(path)
    assert fingerprint(through_the_old_name.state_dict()) == fingerprint(loaded.state_dict())


@pytest.fixture
def foreign():
    """A ViT with the sizes of OpenAI's: heads 64 wide, quick GELU, fp16."""
    return toy(resolution=28, patch=14, vision_width=128, vision_layers=3, vision_heads=2,
               text_width=64, text_heads=1, context_length=12, quick_gelu=True,
               **OPENAI_PIXELS).half()


def save_openai(clip, path):
    """As converted from OpenAI's archive, with three sizes among the weights."""
    sizes = dict(input_resolution=28, context_length=12, vocab_size=clip.config.vocab_size)
    saved = dict(clip.state_dict())
    for name, size in sizes.items():
        saved[name] = torch.tensor(size)
    torch.save(saved, path)


def save_open_clip(clip, path):
    weights = {f"module.{name}": weight for name, weight in clip.state_dict().items()}
    torch.save(dict(epoch=3, state_dict=weights), path)


def write_vocabulary(path):
    path.write_bytes(gzip.compress("\n".join(["a header line", *MERGES]).encode()))


@pytest.mark.parametrize("save, quick_gelu", [(save_openai, None), (save_open_clip, True)])
def test_foreign_weights_load_with_an_inferred_config(foreign, tmp_path, save, quick_gelu):
    save(foreign, tmp_path / "ViT.pt")
    write_vocabulary(tmp_path / VOCABULARY_FILE)             # next to it, where it is found
    loaded = load_clip(tmp_path / "ViT.pt", quick_gelu=quick_gelu)
    assert loaded.config == foreign.config
    images, texts = noise_images(2, 50), ["a cat", "a house"]
    expected = text_score(foreign.float(), images, texts)
    torch.testing.assert_close(text_score(loaded, images, texts), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_open_clip_have_an_exact_gelu(foreign, tmp_path):
    save_open_clip(foreign, tmp_path / "ViT.pt")
    assert not load_clip(tmp_path / "ViT.pt").config.quick_gelu


def test_the_vocabulary_may_lie_elsewhere(foreign, tmp_path):
    save_openai(foreign, tmp_path / "ViT.pt")
    assert load_clip(tmp_path / "ViT.pt").tokenizer is None
    write_vocabulary(tmp_path / "elsewhere.gz")
    loaded = load_clip(tmp_path / "ViT.pt", str(tmp_path / "elsewhere.gz"))
    assert loaded.tokenizer.merges == TOKENIZER.merges


CLIP_DAMAGE = [dict(config=None), dict(config={"colour": 1}), dict(config={7: 1}),
               dict(config={"patch": 99}), dict(merges=7), dict(merges="a.pt"),
               dict(merges=MERGES[:-1]), dict(weights=None), dict(weights={})]


@pytest.mark.parametrize("damage", CLIP_DAMAGE, ids=lambda damage: str(damage)[:24])
def test_a_damaged_clip_is_one_line(tmp_path, damage, recwarn):
    path = tmp_path / "clip.pt"
    save_model(path, "clip", toy(), {}, merges=MERGES)
    torch.save(torch.load(path, weights_only=True) | damage, path)
    assert read_or_refuse(path, load_clip) is None
    assert not recwarn.list


@pytest.mark.parametrize("content", [
    [1, 2], {"state_dict": 3}, {"layer1.weight": torch.ones(2)}, {7: 8}], ids=str)
def test_weights_of_something_else_are_one_line(tmp_path, content):
    path = tmp_path / "clip.pt"
    torch.save(content, path)
    assert read_or_refuse(path, load_clip) is None


@pytest.mark.filterwarnings("ignore")                        # TorchScript warns of its own age
def test_the_advice_about_torchscript_works(tmp_path):
    """OpenAI's files are such archives. The message names the command, its files and its risk."""
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.script(torch.nn.Linear(2, 3)).save(str(path))
    with pytest.raises(ValueError, match="runs the code in it") as error:
        load_clip(path)
    code = re.search(r'python -c "(.*)"', str(error.value))[1]
    assert str(path) in code
    exec(code)
    converted = tmp_path / "ViT-B-32.state_dict.pt"
    assert names_in(tmp_path) == [path.name, converted.name]
    assert list(read_weights(converted)) == ["weight", "bias"]


# --------------------------------------------------------------------------------------------------
# Run folders

@pytest.fixture
def run(tmp_path):
    """A run folder with an adapter of a few weights."""
    folder = tmp_path / "run"
    TunedAdapter(Adapter(8, 1, 1, True)).save(folder / "adapter.pt")
    write_json(folder / "config.json", dict(kind="style", steps=50, style="gold"))
    return folder


@pytest.mark.parametrize("config, kind", [
    ({"kind": "style"}, "style"), ({"kind": "content"}, "content"), ({}, None),
    ({"kind": []}, None), ({"kind": "\x1b[2J"}, None)], ids=str)
def test_kind_of_a_run(run, config, kind):
    write_json(run / "config.json", config)
    assert kind_of(run) == kind


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_damage_hides_no_run(run, content):
    (run / "config.json").write_bytes(content)
    assert kind_of(run) is None
    assert newest_run(run.parent) == run
    assert load_run(run, "style").adapter.config["d_emb"] == 8


def test_the_newest_run_is_a_style(run):
    """By time and not by name. Neither an object nor a folder without an adapter is one."""
    for name, kind, seconds in (("zebra", "style", 1e9), ("apple", "style", 2e9),
                                ("object", "content", 3e9)):
        other = shutil.copytree(run, run.parent / name)
        write_json(other / "config.json", dict(kind=kind))
        os.utime(other / "adapter.pt", (seconds, seconds))
    shutil.rmtree(run)
    (run.parent / "unfinished").mkdir()
    assert newest_run(run.parent) == run.parent / "apple"
    assert newest_run(run.parent / "nowhere") is None


def test_a_run_without_a_time_is_found(run):
    """Archives are unpacked with the time 0. Trap: "there is no run"."""
    os.utime(run / "adapter.pt", (0, 0))
    assert newest_run(run.parent) == run


@pytest.mark.parametrize("place", ["", "run"])
def test_folders_that_may_not_be_read_are_named(run, monkeypatch, place):
    """Trap: "there is no run", or an older one is used in silence."""
    closed = run.parent / place
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and real(path, mode))
    with pytest.raises(ValueError, match=one_line(f"no permission to look into {closed}; give")):
        newest_run(run.parent)


@pytest.mark.parametrize("name", ["", "adapter.pt"], ids=["folder", "file"])
def test_a_run_of_the_other_kind_is_refused(run, name):
    """Trap: the adapter of an object, given as a file, is used as a style."""
    write_json(run / "config.json", dict(kind="content"))
    load_run(run / name, "content")
    with pytest.raises(ValueError, match=one_line("trained with --kind content; .*--content")):
        load_run(run / name, "style")


@pytest.mark.parametrize("kind, other", [("content", "style"), ("style", "content")])
@pytest.mark.parametrize("name", ["c.pt", "run/c.pt"])
def test_an_adapter_file_says_its_kind(run, kind, other, name):
    """Wherever it was copied to, even into the run folder of another kind."""
    write_json(run / "config.json", dict(kind=other))
    path = run.parent / name
    TunedAdapter(Adapter(8, 1, 1, True), about=dict(kind=kind)).save(path)
    load_run(path, kind)
    with pytest.raises(ValueError, match=one_line(f"trained with --kind {kind}; .*--{kind}")):
        load_run(path, other)


@pytest.mark.parametrize("about", [{}, {"kind": 7}, {"kind": "\x1b[2J"}], ids=str)
def test_an_adapter_file_without_a_kind_is_taken_for_either(run, about):
    """Older files have none."""
    path = run.parent / "c.pt"
    TunedAdapter(Adapter(8, 1, 1, True), about=about).save(path)
    load_run(path, "style")
    load_run(path, "content")


def test_a_run_was_made_by_its_recipe(run):
    """Tuples are read back as lists. What else the file says does not matter."""
    path = run / "config.json"
    write_json(path, dict(steps=50, content=["a house"], ref="a.png"))
    assert was_made(path, dict(steps=50, content=("a house",)))
    assert not was_made(run / "missing.json", dict(steps=50))
    with pytest.raises(ValueError, match=one_line(rf"{run} .* settings \(d-prj, steps\);")):
        was_made(path, dict(content=["a house"], d_prj=4, steps=51))


@pytest.mark.parametrize("chosen, words", [
    ([2, 16], r"; human chose 3, 17\);"), ("\x1b[2J", r"\);"), ([True, -1, "x", 2], ".*chose 3"),
    (None, r"\);")])
def test_a_refusal_says_who_chose(run, chosen, words):
    write_json(run / "choice.json", dict(feedback="human", chosen=chosen, pool=8))
    with pytest.raises(ValueError, match=one_line(rf"different settings \(pool{words}")):
        was_made(run / "choice.json", dict(pool=9))


def make_rounds(run, rounds):
    """The files of a run of so many rounds, as far as is_finished looks at them."""
    for name in ("rounds.png", "scores.json"):
        (run / name).touch()
    for number in range(1, rounds + 1):
        (run / f"round{number}").mkdir()
        for name in ("choice.json", "adapter.json", "adapter.pt"):
            (run / f"round{number}" / name).touch()
    write_json(run / "config.json", dict(kind="style", round=rounds))


def test_a_run_of_one_round_is_finished(run):
    assert is_finished(run, 1)
    assert not is_finished(run, 2)


@pytest.mark.parametrize("part", ["rounds.png", "scores.json", "round2/adapter.json",
                                  "round3/adapter.pt", "round3/choice.json"])
def test_a_run_of_three_rounds_has_many_parts(run, part):
    make_rounds(run, 3)
    assert is_finished(run, 3)
    assert not is_finished(run, 2)
    (run / part).unlink()
    assert not is_finished(run, 3)


def test_a_damaged_adapter_is_not_finished(run):
    (run / "adapter.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=one_line(f"adapter.pt is damaged.*; move {run} away")):
        is_finished(run, 1)


def test_two_commands_do_not_share_a_run(tmp_path):
    """Trap: of two pages for one pool, the later choice counts."""
    lock = tmp_path / f".partial-{platform.node()}-{os.getppid()}-lock"
    lock.touch()
    words = f"another command is working on .*remove {lock}"
    with pytest.raises(ValueError, match=words), alone(tmp_path):
        pytest.fail("it works at the same time as the other one")
    assert names_in(tmp_path) == [lock.name]


def test_a_lock_with_our_own_pid_was_left_by_a_dead_process(tmp_path):
    """Trap: in a container that was killed, the next command may have the same number."""
    mine = tmp_path / f"{partial_prefix()}lock"
    mine.touch()
    with alone(tmp_path):
        assert mine.exists()
    assert names_in(tmp_path) == []
