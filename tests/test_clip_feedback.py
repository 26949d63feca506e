"""clip_feedback.py: byte-level BPE, the two towers, files of weights, scores and selection."""

import gzip
import math
import os
import pickle
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENIZER, noise_images, save_merges

import data
import muse
import vqgan
from clip_feedback import (BYTES, CLIP, OPENAI_PIXELS, PRESETS, VOCABULARY_FILE, Tokenizer,
                           build, check_sizes, load_clip, read_weights, select_best,
                           split_words, style_score, text_score)
from experiments import score
from pretrain.common import train_merges
from styledrop import save_model, to_tensor

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
    ("熱気球 🎈", ["熱気球", "🎈"]), ("", [])])
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
    ids = TOKENIZER(["a cat", "a teapot " * 9, ""], 8).tolist()
    assert ids[0] == [start, *cat, end] + [0] * (6 - len(cat))
    assert ids[1:] == [[start, *long[:6], end], [start, end] + [0] * 6]
    assert TOKENIZER.fits("a cat", len(cat) + 2) and not TOKENIZER.fits("a cat", len(cat) + 1)
    ids = TOKENIZER("a <|endoftext|> cat", 32)                    # plain text in a prompt
    assert (ids == end).sum() == 1 and ids.argmax() > 5


def test_openai_vocabulary_file(tmp_path):
    path, merges = tmp_path / VOCABULARY_FILE, ["a t", "c at</w>", "h at</w>"]
    path.write_bytes(gzip.compress("\n".join(["a header line", *merges, ""]).encode()))
    assert Tokenizer(path).merges == [("a", "t"), ("c", "at</w>"), ("h", "at</w>")]
    whole = gzip.compress(b"header\n" + b"a b\n" * 60000)
    path.write_bytes(whole)
    assert Tokenizer(path).vocab_size == 49408                    # it lists more than CLIP uses
    for content in (b"no gzip", gzip.compress(b"header\none two three"), gzip.compress(b"\xff\xfe"),
                    whole[:-9], whole[:12] + b"\xff" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=one_line("not a CLIP vocabulary file")):
            Tokenizer(path)
    for merges in (7, ["a"], ["a b c"], [["a", 7]], [("a" * 999, "b")]):
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

    images, visual = noise_images(2), clip.visual
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
    tower, x = clip.visual, noise_images(2)
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
    close(tower(noise_images(2)), x @ weights["proj"])
    close(clip.encode_image(noise_images(2))[1:], clip.encode_image(noise_images(2)[1:]))


def test_images_of_any_shape_are_cropped_and_resampled(clip):
    image = noise_images(1)
    close(clip.prepare(image), image)                             # ours reads [-1, 1] as it is
    wide = torch.cat([torch.ones(1, 3, 16, 8), image, torch.ones(1, 3, 16, 8)], dim=3)
    close(clip.encode_image(wide), clip.encode_image(image))
    assert clip.encode_image(noise_images(2, 40)).shape == (2, clip.config.embed_dim)
    clip.config = replace(clip.config, **OPENAI_PIXELS)
    white = clip.prepare(torch.ones(1, 3, 33, 33))[0, :, 3, 5]
    assert white.tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-3)


def test_presets_have_the_sizes_that_are_promised():
    with torch.device("meta"):
        weights = CLIP(PRESETS["paper"]).state_dict().values()
    assert sum(w.numel() for w in weights) == 427_616_513     # ViT-L/14 (CLIP, Table 20)
    for presets in (PRESETS, muse.PRESETS, muse.SUPERRES, vqgan.PRESETS):
        for config in presets.values():
            check_sizes(config)


# -- scores and selection

def test_scores_are_plain_cosines(clip):
    """Whatever the size of the features and the temperature; with references, their mean."""
    images, texts, reference = noise_images(3), ["a cat", "a tree", "a cat"], noise_images(2, 9)
    features, ids = clip.encode_image(images), clip.tokenize(texts)
    scores = text_score(clip, images, texts)
    close(scores, F.cosine_similarity(features, clip.encode_text(ids)).detach())
    close(text_score(clip, images, "a cat")[2:], scores[2:])
    cosines = F.cosine_similarity(features[:, None], clip.encode_image(reference), dim=-1).detach()
    close(style_score(clip, images, reference), cosines.mean(1))
    close(style_score(clip, images, reference[0]), cosines[:, 0])
    with torch.no_grad():
        clip.visual.proj.mul_(3)
        clip.text_projection.mul_(5)
        clip.logit_scale.fill_(0.)
    close(text_score(clip, images, texts), scores)
    with pytest.raises(ValueError, match="3 images but 2 texts"):
        text_score(clip, images, ["a", "b"])
    with pytest.warns(UserWarning, match="only the first 14 tokens"):
        text_score(clip, images, "a teapot " * 20)


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


@pytest.mark.parametrize("layout", ["openai", "open_clip"])
def test_foreign_weights_load_with_an_inferred_config(layout, tmp_path):
    """64 wide heads, quick GELU, in fp16. The vocabulary lies beside it, or elsewhere."""
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
    images, texts = noise_images(2, 50), ["a cat", "a house"]
    close(text_score(loaded, images, texts), text_score(foreign.float(), images, texts))
    vocabulary.rename(tmp_path / "elsewhere.gz")
    assert load_clip(path, str(tmp_path / "elsewhere.gz")).tokenizer.merges == TOKENIZER.merges


class Command:
    def __reduce__(self):
        return os.mkdir, (self.there,)


@pytest.mark.filterwarnings("ignore")                             # TorchScript's, of its own age
def test_no_code_of_a_file_is_run(tmp_path, monkeypatch):
    """Archives of TorchScript and pickles with commands: one line each, and none is carried out."""
    target, path, command = tmp_path / "written", tmp_path / "ViT.pt", Command()
    command.there = str(target)
    torch.jit.script(torch.nn.Identity()).save(str(path))
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("its code was run"))
    for write, words in ((lambda: None, "TorchScript archive, which holds code"),
                         (lambda: path.write_bytes(pickle.dumps(command)), "is damaged, or not a"),
                         (lambda: torch.save([command], path), "is damaged, or not a file")):
        write()
        with pytest.raises(ValueError, match=one_line(words)):
            load_clip(path)
        assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()                                        # the trap works


@pytest.mark.parametrize("config, change", [
    *((PRESETS["toy"], change) for change in (
        dict(vision_layers=10 ** 9), dict(vision_layers=()), dict(vision_layers=(2,) * 9),
        dict(vision_layers=(1, 257)), dict(vision_width=2.0), dict(text_width=-1),
        dict(vocab_size=2 ** 40), dict(text_heads=0), dict(text_heads=5), dict(embed_dim=True),
        dict(quick_gelu=1), dict(image_mean="abc"), dict(image_std=(math.nan,) * 3))),
    (muse.PRESETS["toy"], dict(heads=3)), (vqgan.PRESETS["toy"], dict(blocks=300))])
def test_sizes_that_no_model_has_are_refused(config, change):
    with pytest.raises(ValueError, match=one_line(f"{[*change][0]} must be")):
        check_sizes(replace(config, **change))


@pytest.mark.parametrize("change", [
    lambda w: None, lambda w: w.int(), lambda w: w.to_sparse(), lambda w: w * math.nan,
    lambda w: w.double() * 1e300, lambda w: w[:1].clone().expand_as(w), lambda w: w.to("meta"),
    lambda w: w[1:]])
def test_weights_that_do_not_fit_are_named(change):
    """Traps: an infinity after the step to fp32; a small file that claims much memory."""
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    layer = build(lambda: torch.nn.Linear(2, 3), weights)
    assert torch.equal(layer.weight, weights["weight"]) and not layer.training
    for name, wrong in (("weight", change(weights["weight"])), ("one.more", torch.ones(1))):
        with pytest.raises(ValueError, match=one_line(f"'{name}'")):
            build(lambda: torch.nn.Linear(2, 3), weights | {name: wrong})


def test_other_files_are_refused_in_one_line(clip, tmp_path, recwarn):
    path = tmp_path / "clip.pt"
    save_model(path, "clip", clip, {}, merges=save_merges(TOKENIZER))
    saved = read_weights(path)
    contents = [[1, 2], {"state_dict": 3}, {"layer1.weight": torch.ones(2)}, {7: 8}]
    for part, values in dict(config=[None, {"colour": 1}, {7: 1}, {"patch": 99}],
                             merges=[7, "a.pt", saved["merges"][:-1]], weights=[None, {}]).items():
        contents += [saved | {part: value} for value in values]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"0" * 10 ** 6)
    with pytest.raises(ValueError, match=one_line("is compressed")):
        load_clip(path)
    for content in (b"", b"PK\x03\x04" + b"\1" * 99, *contents):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=one_line(str(path))) as error:
            load_clip(path)
        assert len(str(error.value)) < 300 and "eights_only" not in str(error.value)
    for missing in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file of weights at"):
            load_clip(missing)
    assert not recwarn.list


# -- experiments/score.py

def test_scores_of_a_folder(cli, weights, picture, tmp_path):
    """Both scores with their standard errors, against the functions; files in order of names."""
    (tmp_path / "drawn").mkdir()
    files = [picture(name, i) for i, name in enumerate(("drawn/0.png", "drawn/1.png", "ref.png"))]
    (tmp_path / "prompts.txt").write_text("a cat\na house\n")
    path = weights / "clip.pt"
    command = f"--images drawn --ref ref.png --clip {path} --prompts prompts.txt".split()
    code, out, _ = cli(score.main, *command)
    clip = load_clip(path)
    images = to_tensor(np.stack([data.read_image(file, clip.config.resolution) for file in files]))
    scores = dict(text=text_score(clip, images[:2], ["a cat", "a house"]),
                  style=style_score(clip, images[:2], images[2]))
    assert code == 0 and out.splitlines() == [
        f"{name} score {x.mean():.4f} +- {x.std() / 2 ** 0.5:.4f}  (2 pictures, by {path})"
        for name, x in scores.items()]
    (tmp_path / "prompts.txt").write_text("a cat\na house\na tree\n")
    code, out, err = cli(score.main, *command)
    assert code == 2 and out == "" and "2 pictures" in err and "3 prompts" in err
