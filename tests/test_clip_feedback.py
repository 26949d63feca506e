"""clip_feedback.py: byte-level BPE, the two towers, files of weights, scores and selection."""

import gzip
import math
import os
import pickle
import random
import warnings
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENIZER, save_merges
from PIL import Image

import muse
import vqgan
from clip_feedback import (BYTES, CLIP, OPENAI_PIXELS, PRESETS, VOCABULARY_FILE, Tokenizer,
                           build, check_sizes, load_clip, read_weights, select_best,
                           split_words, style_score, text_score)
from experiments import score
from pretrain.clip import contrastive_loss
from pretrain.common import train_merges
from styledrop import load_model, save_model, to_tensor

VIT = dict(vision_layers=2, vision_width=32, vision_heads=2)      # the other kind of image tower
one_line = lambda words: f"^[^\n]*{words}[^\n]*$"
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def toy(**changes):
    torch.manual_seed(0)
    config = replace(PRESETS["toy"], vocab_size=TOKENIZER.vocab_size, **changes)
    return CLIP(config, TOKENIZER).eval()


@pytest.fixture
def clip():
    return toy()


def random_images(count, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- tokenizer

def words(text):
    """The words that a text falls into, back from byte symbols to text."""
    byte = {symbol: byte for byte, symbol in BYTES.items()}
    return [bytes(byte[s] for s in "".join(word).removesuffix("</w>")).decode()
            for word in split_words(text)]


@pytest.mark.parametrize("text, expected", [
    ("  A   Cat's\n\tHAT ", ["a", "cat", "'s", "hat"]),
    ("they'LL 2024 don't!?", ["they", "'ll", "2", "0", "2", "4", "don", "'t", "!?"]),
    ("< salt &amp;amp; pepper", ["<", "salt", "&", "pepper"]),    # escaped twice
    ("“quoted” cafÃ©", ['"', "quoted", '"', "café"]),             # ftfy repairs broken UTF-8
    ("熱気球 に", ["熱気球", "に"]), ("🎈 a", ["🎈", "a"]), ("", [])])
def test_cleaning_and_splitting(text, expected):
    """And no text is unknown: its ids hold the same bytes."""
    assert words(text) == expected
    symbols = "".join(TOKENIZER.symbols[i] for i in TOKENIZER.encode(text))
    assert symbols == "".join("".join(word) for word in split_words(text))


def naive_merges(texts, n_merges):
    """Recount everything after every merge: slow and plain."""
    words, merges = [list(word) for text in texts for word in split_words(text)], []
    for _ in range(n_merges):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        most = max(counts.values())
        a, b = min(pair for pair, count in counts.items() if count == most)
        merges.append((a, b))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == (a, b):
                    word[i:i + 2] = [a + b]
                i += 1
    return merges


def test_trained_merges_equal_a_naive_count():
    texts = ["a hot air balloon", "a hot dog", "the cat sat on the mat", "the hat", "aaaa aaa"] * 2
    texts += ["banana bananas 🎈🎈", "mississippi mmm"]
    assert train_merges(texts, 40) == naive_merges(texts, 40)
    assert train_merges(texts, 10 ** 6) == naive_merges(texts, 10 ** 6)  # each word one symbol
    assert train_merges(texts[::-1], 40) == train_merges(texts, 40)


def test_encode_applies_merges_in_rank_order():
    tokenizer = Tokenizer(["b c", "a b", "a bc", "d </w>"])
    said = [tokenizer.symbols[i] for i in tokenizer.encode("abcb ab")]
    assert said == ["abc", "b</w>", "a", "b</w>"]
    assert tokenizer.vocab_size == 512 + 4 + 2
    assert [tokenizer.symbols[i] for i in (0, 93, 94, 255, 256)] == ["!", "~", "¡", "Ń", "!</w>"]


def test_batch_has_start_end_and_zero_padding():
    start, end = TOKENIZER.start_id, TOKENIZER.end_id
    cat, long = TOKENIZER.encode("a cat"), TOKENIZER.encode("a teapot " * 9)
    ids = TOKENIZER(["a cat", "a teapot " * 9, ""], 8)
    assert ids[0].tolist() == [start, *cat, end] + [0] * (6 - len(cat))
    assert ids[1].tolist() == [start, *long[:6], end]
    assert ids[2].tolist() == [start, end] + [0] * 6
    assert TOKENIZER("a cat", 8).shape == (1, 8)
    assert TOKENIZER.fits("a cat", len(cat) + 2) and not TOKENIZER.fits("a cat", len(cat) + 1)
    ids = TOKENIZER("a <|endoftext|> cat", 32)                    # plain text in a prompt
    assert (ids == end).sum() == 1 and ids.argmax() > 5


def test_openai_vocabulary_file(tmp_path):
    path, merges = tmp_path / VOCABULARY_FILE, ["a t", "c at</w>", "h at</w>"]
    path.write_bytes(gzip.compress("\n".join(["a header line", *merges, ""]).encode()))
    assert Tokenizer(path).merges == [("a", "t"), ("c", "at</w>"), ("h", "at</w>")]
    path.write_bytes(gzip.compress(b"header\n" + b"a b\n" * 60000))
    assert Tokenizer(path).vocab_size == 49408                    # it lists more than CLIP uses
    whole = gzip.compress(b"h\na b")
    for content in (b"no gzip", gzip.compress(b"header\none two three"), gzip.compress(b"\xff\xfe"),
                    whole[:-9], whole[:12] + b"\xff" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=one_line("not a CLIP vocabulary file")):
            Tokenizer(path)


@pytest.mark.parametrize("merges", [7, {"a": "b"}, ["a"], ["a b c"], [7], [["a", 7]],
                                    [("a" * 999, "b")]])
def test_merges_of_other_types_are_refused(merges):
    with pytest.raises(ValueError, match="merges must be pairs of symbols"):
        Tokenizer(merges)


# -- model

@pytest.mark.parametrize("quick_gelu", [False, True])
def test_towers_equal_torch_encoder_layers(quick_gelu):
    """Text tower and ViT again, from PyTorch's own pre-norm layer with the same weights."""
    clip = toy(quick_gelu=quick_gelu, **VIT)
    activation = (lambda x: x * (1.702 * x).sigmoid()) if quick_gelu else F.gelu
    names = {"attn.": "self_attn.", "ln_1.": "norm1.", "ln_2.": "norm2.", "mlp.c_fc.": "linear1.",
             "mlp.c_proj.": "linear2."}

    def run(tower, x, mask=None):
        for block in tower.resblocks:
            layer = torch.nn.TransformerEncoderLayer(32, 2, 128, 0., activation, batch_first=True,
                                                     norm_first=True)
            layer.load_state_dict({new + name.removeprefix(old): w
                                   for name, w in block.state_dict().items()
                                   for old, new in names.items() if name.startswith(old)})
            x = layer(x, src_mask=mask)
        return x

    images, visual = random_images(2), clip.visual
    patches = F.unfold(images, 8, stride=8).transpose(1, 2) @ visual.conv1.weight.flatten(1).T
    x = torch.cat([visual.class_embedding.expand(2, 1, 32), patches], dim=1)
    x = run(visual.transformer, visual.ln_pre(x + visual.positional_embedding))
    close(clip.encode_image(images), visual.ln_post(x)[:, 0] @ visual.proj)

    ids, mask = clip.tokenize(["a cat", "a house"]), torch.full((16, 16), -math.inf).triu(1)
    x = run(clip.transformer, clip.token_embedding.weight[ids] + clip.positional_embedding, mask)
    ends = [row.tolist().index(clip.tokenizer.end_id) for row in ids]
    close(clip.encode_text(ids), clip.ln_final(x)[[0, 1], ends] @ clip.text_projection)


def test_resnet_equals_plain_operations(clip):
    """The tower once more, from its weights: shortcuts, strides, and the averages of both stages.

    In eval mode a feature does not depend on its batch. Trap: left in training mode.
    """
    tower, x = clip.visual, random_images(2)
    weights = tower.state_dict()
    for name in weights:                                          # statistics that have an effect
        if "running" in name:
            weights[name].uniform_(0.5, 2)

    def conv(x, name, stride=1):
        w = weights[f"{name}.0.weight"]
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        mean, var = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()  # its affine is 1, 0

    x = conv(conv(x, "stem.0", 2).relu(), "stem.2").relu()
    one = (x + conv(conv(x, "stages.0.0.conv1").relu(), "stages.0.0.conv2")).relu()
    beside = conv(conv(one, "stages.1.0.conv1", 2).relu(), "stages.1.0.conv2")
    two = (beside + conv(F.avg_pool2d(one, 2), "stages.1.0.shortcut")).relu()
    assert one.shape == (2, 8, 8, 8) and two.shape == (2, 16, 4, 4)
    x = torch.cat([one.mean((2, 3)), two.mean((2, 3))], dim=1)
    x = (x - weights["norm.running_mean"]) / (weights["norm.running_var"] + 1e-5).sqrt()
    close(tower(random_images(2)), x @ weights["proj"])
    close(clip.encode_image(random_images(2))[1:], clip.encode_image(random_images(2)[1:]))


def test_what_follows_the_end_does_not_change_text_features(clip):
    ids = clip.tokenize(["a cat"])
    length = int(ids.argmax()) + 1
    junk, changed = ids.clone(), ids.clone()
    junk[:, length:], changed[0, 1] = 5, 7
    for other in (ids[:, :length], clip.tokenize(["a cat", "a house in flat"])[:1], junk):
        close(clip.encode_text(other), clip.encode_text(ids))
    assert (clip.encode_text(changed) - clip.encode_text(ids)).abs().max() > 1e-3


def test_images_of_any_shape_are_cropped_and_resampled(clip):
    image = random_images(1)
    close(clip.prepare(image), image)                             # ours reads [-1, 1] as it is
    wide = torch.cat([torch.ones(1, 3, 16, 8), image, torch.ones(1, 3, 16, 8)], dim=3)
    close(clip.encode_image(wide), clip.encode_image(image))
    assert clip.encode_image(random_images(2, 40)).shape == (2, clip.config.embed_dim)
    clip.config = replace(clip.config, **OPENAI_PIXELS)
    white = clip.prepare(torch.ones(1, 3, 33, 33))[0, :, 3, 5]
    assert white.tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-3)


@pytest.mark.parametrize("tower", [{}, VIT])
def test_every_weight_gets_a_gradient(tower):
    clip = toy(**tower).train()
    images, ids = random_images(3), clip.tokenize(["a cat", "a tree", "an owl"])
    contrastive_loss(clip.encode_image(images), clip.encode_text(ids), clip.logit_scale).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in clip.parameters())


def test_presets_have_the_sizes_that_are_promised():
    def count(preset, **changes):
        with torch.device("meta"):
            weights = CLIP(replace(PRESETS[preset], **changes)).state_dict()
        return sum(x.numel() for x in weights.values())
    assert count("paper") == 427_616_513      # ViT-L/14 (CLIP Table 20 lists its widths and depths)
    assert 2 * count("tiny", vocab_size=2514) < 9e6               # bytes of a file in fp16
    for presets in (PRESETS, muse.PRESETS, muse.SUPERRES, vqgan.PRESETS):
        for config in presets.values():
            check_sizes(config)


# -- scores and selection

def test_scores_are_plain_cosines(clip):
    images, texts, reference = random_images(3), ["a cat", "a tree", "a cat"], random_images(2, 9)
    features, ids = clip.encode_image(images), clip.tokenize(texts)
    scores = text_score(clip, images, texts)
    close(scores, F.cosine_similarity(features, clip.encode_text(ids)).detach())
    assert not scores.requires_grad
    close(text_score(clip, images, "a cat")[2:], scores[2:])
    cosines = F.cosine_similarity(features[:, None], clip.encode_image(reference), dim=-1).detach()
    close(style_score(clip, images, reference), cosines.mean(1))
    close(style_score(clip, images, reference[0]), cosines[:, 0])
    close(style_score(clip, images, images[1])[1], torch.tensor(1.))
    with torch.no_grad():          # neither the size of the features nor the temperature matters
        clip.visual.proj.mul_(3)
        clip.text_projection.mul_(5)
        clip.logit_scale.fill_(0.)
    close(text_score(clip, images, texts), scores)


def test_scores_explain_wrong_input(clip):
    with pytest.raises(ValueError, match="3 images but 2 texts"):
        text_score(clip, random_images(3), ["a", "b"])
    with pytest.warns(UserWarning, match="only the first 14 tokens"):
        text_score(clip, random_images(1), "a teapot " * 20)
    clip.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        text_score(clip, random_images(1), "a cat")


def test_selection():
    """Each prompt's highest scores."""
    scores = torch.tensor([[.1, .9, .3], [.5, -.2, .4]])
    assert select_best(scores).tolist() == [[1], [0]]
    assert select_best(scores, k=2).tolist() == [[1, 2], [0, 2]]
    for bad, k in ((scores, 4), (scores, 0), (scores[0], 1), (scores / torch.tensor([1, 0, 1]), 1)):
        with pytest.raises(ValueError):
            select_best(bad, k)


# -- files of weights

@pytest.mark.parametrize("tower", [{}, VIT])
def test_checkpoint_round_trip_is_exact(tower, tmp_path):
    clip, path = toy(**tower).half().float(), tmp_path / "clip.pt"
    save_model(path, "clip", clip, {}, merges=save_merges(TOKENIZER))            # in fp16
    loaded, expected = load_clip(path), clip.state_dict()
    assert loaded.config == clip.config and loaded.tokenizer.merges == TOKENIZER.merges
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    for name, w in loaded.state_dict().items():
        assert torch.equal(w, expected[name]) and w.dtype == expected[name].dtype
    assert torch.equal(*(text_score(x, random_images(2), "a cat") for x in (clip, loaded)))


@pytest.mark.parametrize("layout", ["openai", "open_clip"])
def test_foreign_weights_load_with_an_inferred_config(layout, tmp_path):
    """A CLIP in OpenAI's proportions: 64 wide heads, quick GELU, in fp16."""
    path, vocabulary = tmp_path / "ViT.pt", tmp_path / VOCABULARY_FILE
    foreign = toy(resolution=28, patch=14, vision_width=128, vision_layers=3, vision_heads=2,
                  text_width=64, text_heads=1, context_length=12, quick_gelu=True,
                  **OPENAI_PIXELS).half()
    saved = foreign.state_dict()
    if layout == "openai":                                        # as converted from its archive
        sizes = dict(input_resolution=28, context_length=12, vocab_size=foreign.config.vocab_size)
        torch.save(saved | {name: torch.tensor(size) for name, size in sizes.items()}, path)
    else:
        torch.save(dict(epoch=3, state_dict={f"module.{k}": w for k, w in saved.items()}), path)
        assert not load_clip(path).config.quick_gelu
    assert load_clip(path).tokenizer is None
    vocabulary.write_bytes(gzip.compress("\n".join(["h", *save_merges(TOKENIZER)]).encode()))
    loaded = load_clip(path, quick_gelu=True if layout == "open_clip" else None)
    assert loaded.config == foreign.config
    images, texts = random_images(2, 50), ["a cat", "a house"]    # the vocabulary lies beside it
    close(text_score(loaded, images, texts), text_score(foreign.float(), images, texts))
    vocabulary.rename(tmp_path / "elsewhere.gz")
    assert load_clip(path, str(tmp_path / "elsewhere.gz")).tokenizer.merges == TOKENIZER.merges


class Writes(torch.nn.Module):
    """A module whose TorchScript archive writes a file when it is opened."""

    def __init__(self, there):
        super().__init__()
        self.there = there

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> str:
        return self.there

    @torch.jit.export
    def __setstate__(self, there: str) -> None:
        self.there = there
        self.training = False
        torch.save(torch.ones(3), there)


class Command:
    def __reduce__(self):
        return os.mkdir, (self.there,)


@pytest.mark.filterwarnings("ignore")                             # TorchScript's, of its own age
def test_no_code_of_a_file_is_run(tmp_path):
    """Archives of TorchScript and pickles with commands: one line each, and nothing is written."""
    target, path, command = tmp_path / "written", tmp_path / "ViT.pt", Command()
    command.there = str(target)
    torch.jit.script(Writes(str(target))).save(str(path))
    torch.jit.load(str(path))
    target.unlink()                                               # the trap works
    for write, words in ((lambda: None, "TorchScript archive, which holds code"),
                         (lambda: path.write_bytes(pickle.dumps(command)), "is damaged, or not a"),
                         (lambda: torch.save([command], path), "is damaged, or not a file")):
        write()
        with pytest.raises(ValueError, match=one_line(words)):
            load_clip(path)
        assert not target.exists()


@pytest.mark.parametrize("config, changes", [
    (config, changes) for config, cases in (
        (PRESETS["toy"], [dict(vision_layers=10 ** 9), dict(vision_layers=()), dict(text_heads=0),
                          dict(vision_layers=(2,) * 9), dict(vision_layers=(1, 257)),
                          dict(vision_width=2.0), dict(text_width=-1), dict(vocab_size=2 ** 40),
                          dict(text_heads=5), dict(embed_dim=True), dict(quick_gelu=1),
                          dict(image_mean="abc"), dict(image_std=(math.nan,) * 3),
                          dict(context_length=None), dict(text_width="32")]),
        (muse.PRESETS["toy"], [dict(layers=257), dict(heads=3), dict(grid=(4, 4))]),
        (vqgan.PRESETS["toy"], [dict(blocks=300), dict(channels=[8, 8]), dict(decay=math.inf),
                                dict(channels=(8, -8))])) for changes in cases])
def test_sizes_that_no_model_has_are_refused(config, changes):
    check_sizes(config)
    with pytest.raises(ValueError, match=one_line(f"{[*changes][0]} must be")):
        check_sizes(replace(config, **changes))


@pytest.mark.parametrize("change", [
    lambda w: None, lambda w: "x", lambda w: w.int(), lambda w: w.to_sparse(),
    lambda w: w * math.nan, lambda w: w.double() * 1e300, lambda w: w[:1].clone().expand_as(w),
    lambda w: w.to("meta"), lambda w: w[1:], lambda w: w.to(torch.complex64)])
def test_weights_that_do_not_fit_are_named(change):
    """Traps: an infinity after the step to fp32; a small file that claims much memory."""
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    layer = build(lambda: torch.nn.Linear(2, 3), weights)
    assert torch.equal(layer.weight, weights["weight"]) and not layer.training
    with pytest.raises(ValueError, match=one_line("'weight'")):
        build(lambda: torch.nn.Linear(2, 3), weights | {"weight": change(weights["weight"])})
    with pytest.raises(ValueError, match=one_line("'one.more'")):
        build(lambda: torch.nn.Linear(2, 3), weights | {"one.more": torch.ones(1)})


def test_other_files_are_refused_in_one_line(clip, tmp_path, recwarn):
    path = tmp_path / "clip.pt"
    save_model(path, "clip", clip, {}, merges=save_merges(TOKENIZER))
    whole, saved = path.read_bytes(), read_weights(path)

    def refuses(content):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError) as error:
            load_clip(path)
        said = str(error.value)
        assert "\n" not in said and str(path) in said and len(said) < 300
        assert not any(word in said for word in ("Weights only", "weights_only", "PytorchStream"))

    for content in (b"", b"hello", b"PK\x03\x04" + b"\1" * 99, pickle.dumps([1, 2], 4)):
        refuses(content)
    for content in ([1, 2], {"state_dict": 3}, {"layer1.weight": torch.ones(2)}, {7: 8}):
        refuses(content)
    for part, values in dict(config=[None, [], {"colour": 1}, {7: 1}, {"patch": 99}],
                             merges=[7, "clip.pt", ["a"], [[1, 2]], saved["merges"][:-1]],
                             weights=[None, [], {}, {7: 8}]).items():
        for value in values:
            refuses({**saved, part: value})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"0" * 10 ** 6)
    refuses(path.read_bytes())
    for missing in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file of weights at"):
            load_clip(missing)
    with pytest.raises(ValueError, match="same merges"):
        CLIP(PRESETS["toy"], TOKENIZER)
    assert not recwarn.list


SMALL = dict(
    clip=lambda: CLIP(replace(PRESETS["toy"], vision_layers=(1,), text_layers=1,
                              vocab_size=TOKENIZER.vocab_size), TOKENIZER),
    vqgan=lambda: vqgan.VQGAN(replace(vqgan.PRESETS["toy"], channels=(2, 4))),
    muse=lambda: muse.Muse(replace(muse.PRESETS["toy"], layers=1, text_layers=0)))
LOAD = dict(clip=load_clip, muse=lambda path: load_model(path, "muse", muse.MuseConfig, muse.Muse),
            vqgan=lambda path: load_model(path, "vqgan", vqgan.VQGANConfig, vqgan.VQGAN))


@pytest.mark.parametrize("kind", SMALL)
def test_randomly_damaged_files(kind, tmp_path, capfd):
    """Flipped bytes, cut tails, inserted runs: a model, or one line; torch's words never show."""
    path, chance, refused = tmp_path / f"{kind}.pt", random.Random(0), 0
    save_model(path, kind, SMALL[kind](), {}, merges=save_merges(TOKENIZER))
    whole = path.read_bytes()
    pickled, tail = whole.index(b".", whole.index(b"provenance")) + 99, len(whole) - 2000
    anywhere = lambda: chance.choice([chance.randrange(pickled), chance.randrange(tail, len(whole)),
                                      chance.randrange(len(whole))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(500):
            damaged, place = bytearray(whole), anywhere()
            if i % 10 == 0:
                damaged = damaged[:place]
            elif i % 10 == 1:
                damaged[place:place] = chance.randbytes(chance.choice((1, 7, 64, 5000)))
            else:
                for _ in range(chance.choice((1, 3, 30))):
                    damaged[anywhere()] = chance.randrange(256)
            path.write_bytes(damaged)
            try:
                LOAD[kind](path)
            except (ValueError, OSError) as error:
                refused += 1
                assert 0 < len(str(error)) < 400 and "\n" not in str(error)
    assert 250 < refused < 500 and capfd.readouterr() == ("", "")


# -- experiments/score.py

def test_scores_of_a_folder(cli, weights, tmp_path):
    """Both scores with their standard errors, against the functions; files in order of names."""
    (tmp_path / "drawn").mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / (f"drawn/{i}.png" if i < 3 else "ref.png"))
    (tmp_path / "prompts.txt").write_text("a cat\na house\na tree\n")
    command = ("--images", "drawn", "--ref", "ref.png", "--clip", weights / "clip.pt",
               "--prompts", "prompts.txt")
    code, out, _ = cli(score.main, *command)
    clip, images = load_clip(weights / "clip.pt"), to_tensor(pictures)
    scores = dict(text=text_score(clip, images[:3], ["a cat", "a house", "a tree"]),
                  style=style_score(clip, images[:3], images[3]))
    assert code == 0 and out.splitlines() == [
        f"{name} score {x.mean():.4f} +- {x.std() / 3 ** 0.5:.4f}  "
        f"(3 pictures, by {weights / 'clip.pt'})" for name, x in scores.items()]
    (tmp_path / "prompts.txt").write_text("a cat\na house\n")
    code, out, err = cli(score.main, *command)
    assert code == 2 and out == "" and "3 pictures" in err and "2 prompts" in err
