"""clip_feedback.py: byte-level BPE, the two towers, the contrastive loss, files, scores and selection."""

import gzip
import math
import os
import pickle
import zipfile
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip_feedback import (CLIP, OPENAI_PIXELS, PRESETS, VOCABULARY_FILE, Attention, CLIPConfig,
                           Tokenizer, contrastive_loss, load_clip, select_best, select_random,
                           split_words, style_score, text_score, train_merges)
from experiments import score
from pretrain.clip import InTurn, StyleWords, augment
from styledrop import to_tensor

VIT = dict(vision_layers=2, vision_width=32, vision_heads=2)          # the other kind of image tower

CORPUS = ["a hot air balloon in flat vector style", "a hot dog", "a balloon animal", "the cat sat on the mat",
          "a cat in watercolor style", "blue and gold watercolor on black", "a cat and a balloon", "the hat"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_merges(CORPUS, 40))


@pytest.fixture
def clip(tokenizer):
    torch.manual_seed(0)
    return CLIP(replace(PRESETS["toy"], vocab_size=tokenizer.vocab_size), tokenizer).eval()


@pytest.fixture
def vit(tokenizer):
    torch.manual_seed(0)
    return CLIP(replace(PRESETS["toy"], vocab_size=tokenizer.vocab_size, **VIT), tokenizer).eval()


def random_images(count, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- tokenizer

WORDS = [f"{a}{b}{c}" for a in ("bl", "str", "o", "qu", "zeph", "ä", "ka", "mer")
         for b in ("a", "ee", "i", "ou", "u", "y", "oa", "ei")
         for c in ("n", "rt", "lloon", "x", "", "ße", "gl", "k")][:500]


@pytest.mark.parametrize("text", [
    "a hot air balloon", "crème brûlée", "naïve 🎈 and 👩‍🚀!", "воздушный шар", "熱気球 に 乗る", "بالون هواء",
    "गुब्बारा", "\u00ad soft hyphen?", "", "</w> <|endoftext|> end", " ".join(WORDS)])
def test_decode_gives_back_the_cleaned_text(tokenizer, text):
    cleaned = [word for word in tokenizer.decode(tokenizer.encode(text)).split(" ") if word]
    assert len(cleaned) == len(list(split_words(text)))
    assert "".join(cleaned) == "".join(text.lower().split())


def test_cleaning_and_splitting(tokenizer):
    def words(text):
        return [tokenizer.decode(tokenizer.ids[s] for s in word) for word in split_words(text)]
    assert words("  A   Cat's\n\tHAT ") == ["a", "cat", "'s", "hat"]
    assert words("they'LL 2024 don't!?") == ["they", "'ll", "2", "0", "2", "4", "don", "'t", "!?"]
    assert words("< salt &amp;amp; pepper") == ["<", "salt", "&", "pepper"]  # escaped twice
    assert words("“quoted” cafÃ©") == ['"', "quoted", '"', "café"]  # ftfy repairs quotes and broken UTF-8
    assert words("") == []


def naive_merges(texts, n_merges):
    """Recount everything after every merge: slow and plain."""
    words = [word for text in texts for word in split_words(text)]
    merges = []
    for _ in range(n_merges):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        most = max(counts.values())
        a, b = best = min(pair for pair, count in counts.items() if count == most)
        merges.append(best)
        joined = []
        for word in words:
            out = []
            for symbol in word:
                if out and out[-1] is not None and (out[-1], symbol) == best:
                    out[-1:] = [a + b, None]  # the None keeps a joined symbol from joining again in this pass
                else:
                    out = [s for s in out if s is not None] + [symbol]
            joined.append(tuple(s for s in out if s is not None))
        words = joined
    return merges


def test_trained_merges_equal_a_naive_count():
    texts = CORPUS + ["aaaa aaa banana bananas 🎈🎈", "mississippi mmm"]
    assert train_merges(texts, 90) == naive_merges(texts, 90)
    assert train_merges(texts, 10 ** 6) == naive_merges(texts, 10 ** 6)  # stops by itself, every word one symbol
    assert train_merges(texts[::-1], 90) == train_merges(texts, 90)


def test_encode_applies_merges_in_rank_order():
    tokenizer = Tokenizer(["b c", "a b", "a bc", "d </w>"])
    assert [tokenizer.symbols[i] for i in tokenizer.encode("abcb ab")] == ["abc", "b</w>", "a", "b</w>"]
    assert tokenizer.vocab_size == 512 + 4 + 2
    assert [tokenizer.symbols[i] for i in (0, 93, 94, 255, 256)] == ["!", "~", "¡", "Ń", "!</w>"]  # CLIP's order


def test_batch_has_start_end_and_zero_padding(tokenizer):
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    cat, long = tokenizer.encode("a cat"), tokenizer.encode("a balloon " * 9)
    ids = tokenizer(["a cat", "a balloon " * 9, ""], 8)
    assert ids[0].tolist() == [start, *cat, end] + [0] * (6 - len(cat))
    assert ids[1].tolist() == [start, *long[:6], end]
    assert ids[2].tolist() == [start, end] + [0] * 6
    assert tokenizer("a cat", 8).shape == (1, 8)
    assert tokenizer.fits("a cat", len(cat) + 2) and not tokenizer.fits("a cat", len(cat) + 1)


def test_special_words_in_a_prompt_are_plain_text(tokenizer):
    ids = tokenizer("a <|endoftext|> cat", 32)
    assert (ids == tokenizer.end_id).sum() == 1 and ids.argmax() > 5


def test_openai_vocabulary_file(tmp_path):
    merges = ["a t", "c at</w>", "h at</w>"]
    path = tmp_path / VOCABULARY_FILE
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(['"a header line" - Version : 0.2', *merges, ""]))
    assert Tokenizer(path).merges == Tokenizer(merges).merges
    assert Tokenizer(merges).merges == [("a", "t"), ("c", "at</w>"), ("h", "at</w>")]
    with gzip.open(path, "wt") as file:
        file.write("header\n" + "a b\n" * 60000)
    assert Tokenizer(path).vocab_size == 49408  # the file lists more merges than CLIP uses
    whole = gzip.compress(b"h\na b")
    for content in (b"no gzip", gzip.compress(b"header\none two three"), gzip.compress(b"\xff\xfe"),
                    whole[:-9], whole[:12] + b"\xff" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^[^\n]*not a CLIP vocabulary file[^\n]*$"):
            Tokenizer(path)


@pytest.mark.parametrize("merges", [7, {"a": "b"}, ["a"], ["a b c"], [7], [["a", 7]], [("a" * 999, "b")]])
def test_merges_of_other_types_are_refused(merges):
    with pytest.raises(ValueError, match="merges must be pairs of symbols"):
        Tokenizer(merges)


# -- model

def test_attention_equals_multihead_attention():
    for causal in (False, True):
        ours, x = Attention(24, 3, causal), torch.randn(2, 7, 24)
        torch.nn.init.normal_(ours.in_proj_weight)
        torch.nn.init.normal_(ours.in_proj_bias)
        torchs = torch.nn.MultiheadAttention(24, 3, batch_first=True)
        torchs.load_state_dict(ours.state_dict())  # strict: the names agree too
        mask = torch.full((7, 7), -math.inf).triu(1) if causal else None
        torch.testing.assert_close(ours(x), torchs(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_towers_equal_torch_encoder_layers(tokenizer, quick_gelu):
    """Text tower and ViT again, from PyTorch's own pre-norm layer with the same weights."""
    torch.manual_seed(0)
    config = replace(PRESETS["toy"], vocab_size=tokenizer.vocab_size, quick_gelu=quick_gelu, **VIT)
    clip = CLIP(config, tokenizer).eval()
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
    patches = F.unfold(images, 8, stride=8).transpose(1, 2)                       # (B, N, 3 8 8)
    patches = patches @ visual.conv1.weight.flatten(1).T                          # (B, N, D)
    x = torch.cat([visual.class_embedding.expand(2, 1, 32), patches], dim=1)
    x = run(visual.transformer, visual.ln_pre(x + visual.positional_embedding))
    expected = visual.ln_post(x)[:, 0] @ visual.proj
    torch.testing.assert_close(clip.encode_image(images), expected, rtol=1e-4, atol=1e-5)

    ids, mask = clip.tokenize(["a cat", "a hot air balloon"]), torch.full((16, 16), -math.inf).triu(1)
    x = run(clip.transformer, clip.token_embedding.weight[ids] + clip.positional_embedding, mask)
    ends = [row.tolist().index(clip.tokenizer.end_id) for row in ids]
    expected = clip.ln_final(x)[[0, 1], ends] @ clip.text_projection
    torch.testing.assert_close(clip.encode_text(ids), expected, rtol=1e-4, atol=1e-5)


def test_resnet_equals_plain_operations(clip):
    """The tower once more, from its weights: shortcuts, strides, and the averages of both stages."""
    tower, x = clip.visual, random_images(2)
    weights = tower.state_dict()
    for name in weights:                                           # statistics that have an effect
        if "running" in name:
            weights[name].uniform_(0.5, 2)

    def conv(x, name, stride=1):
        w = weights[f"{name}.0.weight"]
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)
        mean, var = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()    # its affine is 1, 0

    x = conv(conv(x, "stem.0", 2).relu(), "stem.2").relu()
    one = (x + conv(conv(x, "stages.0.0.conv1").relu(), "stages.0.0.conv2")).relu()
    beside = conv(conv(one, "stages.1.0.conv1", 2).relu(), "stages.1.0.conv2")
    two = (beside + conv(F.avg_pool2d(one, 2), "stages.1.0.shortcut")).relu()
    assert one.shape == (2, 8, 8, 8) and two.shape == (2, 16, 4, 4)
    averages = torch.cat([one.mean((2, 3)), two.mean((2, 3))], dim=1)
    averages = (averages - weights["norm.running_mean"]) / (weights["norm.running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(tower(random_images(2)), averages @ weights["proj"], rtol=1e-4, atol=1e-5)


def test_tower_scores_each_picture_alone(clip):
    """In eval mode a feature does not depend on its batch. Trap: left in training mode."""
    images = random_images(4)
    clip.visual.norm.running_mean.normal_()
    torch.testing.assert_close(clip.encode_image(images)[2:3], clip.encode_image(images[2:3]),
                               rtol=1e-4, atol=1e-5)
    score_ = text_score(clip, images, "a cat")
    torch.testing.assert_close(score_[1:2], text_score(clip, images[1:2], "a cat"))


def test_what_follows_the_end_does_not_change_text_features(clip):
    ids = clip.tokenize(["a cat"])
    length = int(ids.argmax()) + 1
    junk = ids.clone()
    junk[:, length:] = 5
    for other in (ids[:, :length], clip.tokenize(["a cat", "a hot air balloon in flat"])[:1], junk):
        torch.testing.assert_close(clip.encode_text(other), clip.encode_text(ids), rtol=1e-5, atol=1e-6)
    changed = ids.clone()
    changed[0, 1] = 7
    assert (clip.encode_text(changed) - clip.encode_text(ids)).abs().max() > 1e-3


def test_images_of_any_shape_are_cropped_and_resampled(clip):
    image = random_images(1)
    torch.testing.assert_close(clip.prepare(image), image)  # our weights read [-1, 1] as it is
    wide = torch.cat([torch.ones(1, 3, 16, 8), image, torch.ones(1, 3, 16, 8)], dim=3)
    torch.testing.assert_close(clip.encode_image(wide), clip.encode_image(image))
    assert clip.encode_image(random_images(2, 40)).shape == (2, clip.config.embed_dim)
    clip.config = replace(clip.config, **OPENAI_PIXELS)
    white = clip.prepare(torch.ones(1, 3, 33, 33))
    torch.testing.assert_close(white[0, :, 3, 5], torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-3, rtol=0)


def test_presets_have_the_sizes_that_are_promised():
    def count(**changes):
        with torch.device("meta"):
            return sum(x.numel() for x in CLIP(replace(PRESETS[preset], **changes)).state_dict().values())
    preset = "paper"
    assert count() == 427_616_513              # ViT-L/14 (CLIP Table 20 lists its widths and depths)
    preset = "tiny"
    assert 2 * count(vocab_size=2514) < 9e6    # bytes of a file in fp16


@pytest.mark.parametrize("changes", [
    dict(vision_layers=10 ** 9), dict(vision_layers=()), dict(vision_layers=(2,) * 9), dict(vision_width=2.0),
    dict(vision_layers=(1, 10 ** 9)), dict(text_width=0), dict(vocab_size=2 ** 40), dict(text_heads=5),
    dict(resolution=10 ** 6), dict(embed_dim=True), dict(image_std=(1.0, 1.0)), dict(image_mean="abc"),
    dict(context_length=None), dict(vision_layers=2, patch=32), dict(vision_layers=2, vision_heads=7)])
def test_sizes_out_of_bounds_are_refused_before_anything_is_built(changes):
    with pytest.raises(ValueError, match="^[^\n]*must be[^\n]*$"):
        replace(PRESETS["toy"], **changes)


# -- loss

def test_contrastive_loss_equals_a_plain_loop():
    torch.manual_seed(1)
    images, texts, scale = torch.randn(5, 8), torch.randn(5, 8), torch.tensor(7.)
    total = 0.
    for i in range(5):
        rows = [scale * F.cosine_similarity(images[i], texts[j], dim=0) for j in range(5)]
        columns = [scale * F.cosine_similarity(images[j], texts[i], dim=0) for j in range(5)]
        total -= rows[i] - torch.stack(rows).logsumexp(0) + columns[i] - torch.stack(columns).logsumexp(0)
    torch.testing.assert_close(contrastive_loss(images, texts, scale.log()), total / 10)
    hundred = torch.tensor(math.log(100))
    assert torch.equal(contrastive_loss(images, texts, hundred + 1), contrastive_loss(images, texts, hundred))


def test_loss_reads_the_mask_as_images_by_texts():
    """Text 1 is right for image 0 too, but image 1 is not text 0's: rows are images, columns texts."""
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 2]]
    same = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.bool)
    scale = torch.tensor(5.)
    logits = scale * images @ texts.T
    logp_text, logp_image = logits.log_softmax(1), logits.log_softmax(0)
    to_text = -(logp_text[0, :2].mean() + logp_text[1, 1] + logp_text[2, 2]) / 3
    to_image = -(logp_image[0, 0] + logp_image[:2, 1].mean() + logp_image[2, 2]) / 3
    torch.testing.assert_close(contrastive_loss(images, texts, scale.log(), same), (to_text + to_image) / 2)


def test_loss_of_identical_embeddings_is_log_batch():
    same = torch.eye(6, dtype=torch.bool)
    same[0, 3] = same[3, 0] = True
    for mask in (None, same):
        loss = contrastive_loss(torch.ones(6, 4), torch.ones(6, 4), torch.tensor(2.), mask)
        assert loss.item() == pytest.approx(math.log(6))


def test_identical_captions_are_not_negatives():
    """Images 0 and 1 share a caption. At the best embedding the loss asks for no change; plain CLIP's does."""
    features = torch.eye(4)[[0, 0, 1, 2]].requires_grad_()
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    scale = torch.tensor(100.).log()
    loss = contrastive_loss(features, features.detach(), scale, same)
    assert loss.item() == pytest.approx(math.log(2) / 2, abs=1e-5)  # half of the rows have two right answers
    nudged = features.detach().clone()
    nudged[0, 3], nudged[1, 3] = 0.1, -0.1                            # apart from each other
    assert contrastive_loss(nudged, nudged, scale, same) > loss + 1e-3


@pytest.mark.parametrize("tower", ["clip", "vit"])
def test_a_few_steps_learn_to_tell_pictures_apart(tower, request):
    clip = request.getfixturevalue(tower).train()
    shades = torch.stack([torch.full((3, 16, 16), v) for v in (-1., 0., 1.)]).repeat(2, 1, 1, 1)
    images = shades + random_images(6) * 0.1
    ids = clip.tokenize(["a cat", "the hat", "a balloon"] * 2)
    same = (ids[:, None] == ids[None]).all(-1)
    optimiser = torch.optim.AdamW(clip.parameters(), 1e-3)
    for _ in range(30):
        loss = contrastive_loss(clip.encode_image(images), clip.encode_text(ids), clip.logit_scale, same)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < math.log(2) + 0.2                                   # each has two right answers
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in clip.parameters())


# -- scores and selection

def test_scores_are_plain_cosines(clip):
    images, texts = random_images(3), ["a cat", "the hat", "a cat"]
    features, ids = clip.encode_image(images), clip.tokenize(texts)
    expected = F.cosine_similarity(features, clip.encode_text(ids))
    scores = text_score(clip, images, texts)
    torch.testing.assert_close(scores, expected.detach())
    assert not scores.requires_grad
    torch.testing.assert_close(text_score(clip, images, "a cat")[2:], scores[2:])
    reference = random_images(2, seed=9)
    cosines = torch.stack([F.cosine_similarity(features, clip.encode_image(reference[r:r + 1])) for r in range(2)])
    torch.testing.assert_close(style_score(clip, images, reference), cosines.mean(0).detach())
    torch.testing.assert_close(style_score(clip, images, reference[0]), cosines[0].detach())
    torch.testing.assert_close(style_score(clip, images, images[1])[1], torch.tensor(1.))
    with torch.no_grad():  # neither the size of the features nor the temperature matters
        clip.visual.proj.mul_(3)
        clip.text_projection.mul_(5)
        clip.logit_scale.fill_(0.)
    torch.testing.assert_close(text_score(clip, images, texts), scores)


def test_scores_explain_wrong_input(clip):
    with pytest.raises(ValueError, match="3 images but 2 texts"):
        text_score(clip, random_images(3), ["a", "b"])
    with pytest.warns(UserWarning, match="only the first 14 tokens"):
        text_score(clip, random_images(1), "a balloon " * 20)
    clip.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        text_score(clip, random_images(1), "a cat")


def test_select_best_picks_each_prompts_highest():
    scores = torch.tensor([[.1, .9, .3], [.5, -.2, .4]])
    assert select_best(scores).tolist() == [[1], [0]]
    assert select_best(scores, k=2).tolist() == [[1, 2], [0, 2]]
    for bad, k in ((scores, 4), (scores, 0), (scores[0], 1), (scores / torch.tensor([1, 0, 1]), 1)):
        with pytest.raises(ValueError):
            select_best(bad, k)


def test_select_random_is_seeded_uniform_and_without_repeats():
    picks = select_random(4000, 4, torch.Generator().manual_seed(3))
    assert picks.shape == (4000, 1) and torch.equal(picks, select_random(4000, 4, torch.Generator().manual_seed(3)))
    assert (picks.flatten().bincount(minlength=4) - 1000).abs().max() < 120
    assert all(len(set(row)) == 3 for row in select_random(50, 4, k=3).tolist())
    with pytest.raises(ValueError):
        select_random(2, 3, k=4)


# -- files

def save_clip(path, clip, provenance=None, half=False):
    weights = {name: w.half() if half and w.is_floating_point() else w for name, w in clip.state_dict().items()}
    merges = [" ".join(pair) for pair in clip.tokenizer.merges]
    torch.save(dict(config=asdict(clip.config), weights=weights, merges=merges, provenance=provenance or {}), path)


@pytest.mark.parametrize("tower", ["clip", "vit"])
def test_checkpoint_round_trip_is_exact(tower, request, tmp_path):
    clip = request.getfixturevalue(tower)
    save_clip(tmp_path / "clip.pt", clip, dict(steps=7))
    loaded = load_clip(tmp_path / "clip.pt")
    assert loaded.config == clip.config and loaded.tokenizer.merges == clip.tokenizer.merges
    assert loaded.provenance == dict(steps=7) and not loaded.training
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in clip.state_dict().items())
    images = random_images(2)
    assert torch.equal(text_score(clip, images, "a cat"), text_score(loaded, images, "a cat"))
    save_clip(tmp_path / "half.pt", clip, half=True)
    loaded = load_clip(tmp_path / "half.pt")
    assert loaded.visual.proj.dtype == torch.float32 and loaded.visual.proj.requires_grad
    assert torch.equal(loaded.visual.proj, clip.visual.proj.half().float())


@pytest.fixture
def foreign(tokenizer):
    """A CLIP in OpenAI's proportions: 64 wide heads, quick GELU, weights that are exact in fp16."""
    torch.manual_seed(0)
    config = CLIPConfig(resolution=28, patch=14, vision_width=128, vision_layers=3, vision_heads=2,
                        text_width=64, text_layers=2, text_heads=1, context_length=12,
                        vocab_size=tokenizer.vocab_size, embed_dim=40, quick_gelu=True, **OPENAI_PIXELS)
    return CLIP(config, tokenizer).half().float().eval()


@pytest.mark.parametrize("layout", ["openai", "open_clip"])
def test_foreign_weights_load_with_an_inferred_config(foreign, layout, tmp_path):
    path, vocabulary = tmp_path / "ViT.pt", tmp_path / VOCABULARY_FILE
    if layout == "openai":                                        # as converted from its archive
        sizes = dict(input_resolution=28, context_length=12, vocab_size=foreign.config.vocab_size)
        sizes = {name: torch.tensor(size) for name, size in sizes.items()}
        torch.save({**foreign.half().state_dict(), **sizes}, path)
    else:
        weights = {f"module.{name}": w for name, w in foreign.state_dict().items()}
        torch.save(dict(epoch=3, state_dict=weights), path)
    foreign.float()
    with gzip.open(vocabulary, "wt", encoding="utf-8") as file:
        file.write("\n".join(["header", *(" ".join(pair) for pair in foreign.tokenizer.merges), ""]))
    loaded = load_clip(path, quick_gelu=True if layout == "open_clip" else None)  # vocabulary beside
    assert loaded.config == foreign.config
    images, texts = random_images(2, 50), ["a cat", "the hat"]
    assert torch.equal(text_score(loaded, images, texts), text_score(foreign, images, texts))
    vocabulary.rename(tmp_path / "elsewhere.gz")
    assert load_clip(path).tokenizer is None
    assert load_clip(path, tmp_path / "elsewhere.gz").tokenizer.merges == foreign.tokenizer.merges
    if layout == "open_clip":
        assert not load_clip(path).config.quick_gelu


class Writes(torch.nn.Module):
    """A module whose TorchScript archive writes a file when it is opened."""

    def __init__(self):
        super().__init__()
        self.there = "TARGET"

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
def test_no_code_of_a_file_is_run(tmp_path, recwarn):
    """Archives of TorchScript and pickles with commands: one line each, and nothing is written."""
    target, path = tmp_path / "written", tmp_path / "ViT.pt"
    module = Writes()
    module.there = str(target)
    torch.jit.script(module).save(str(path))
    torch.jit.load(str(path))
    assert target.exists()                                        # the trap works
    target.unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*TorchScript archive, which holds code[^\n]*torch.save"):
        load_clip(path)
    assert not target.exists()
    command = Command()
    command.there = str(target)
    for write in (lambda: path.write_bytes(pickle.dumps(command)), lambda: torch.save([command], path)):
        write()
        with pytest.raises(ValueError, match="^[^\n]*is damaged, or not a file of weights[^\n]*$"):
            load_clip(path)
        assert not target.exists()


def test_damaged_or_foreign_files_are_refused_in_one_line(clip, tmp_path, recwarn):
    path = tmp_path / "clip.pt"
    save_clip(path, clip)
    whole = path.read_bytes()
    broken = torch.load(path, weights_only=True)

    def refuses(content):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError) as error:
            load_clip(path)
        said = str(error.value)
        assert "\n" not in said and str(path) in said and len(said) < 300
        assert not any(word in said for word in ("Weights only", "weights_only", "PytorchStream"))

    for content in (b"", b"hello", whole[:200], whole[:len(whole) // 2], whole[:-30], b"\0" * 500,
                    b"PK\x03\x04" + b"\1" * 99, pickle.dumps([1, 2], 4)):
        refuses(content)
    for content in ([1, 2], {"state_dict": 3}, {"layer1.weight": torch.ones(2)}, {7: 8}):
        refuses(content)
    for part, values in dict(config=[None, [], {"colour": 1}, {7: 1}], merges=[7, ["a"], [[1, 2]]],
                             weights=[None, [], {}, {7: 8}], provenance=[None, "made by me", [1]]).items():
        for value in values:
            refuses({**broken, part: value})
    refuses({**broken, "merges": broken["merges"][:-1]})
    for field, value in dict(colour=1, text_layers=3, embed_dim=25, vision_layers=10 ** 9,
                             vocab_size=2 ** 19, text_width="32", text_heads=0).items():
        refuses({**broken, "config": {**broken["config"], field: value}})
    proj = broken["weights"]["visual.proj"]
    for weight in (None, "x", proj.int(), proj.to_sparse(), proj * math.nan, proj[:1].clone().expand_as(proj),
                   proj.to("meta")):
        refuses({**broken, "weights": {**broken["weights"], "visual.proj": weight}})
    refuses({**broken, "weights": {**broken["weights"], "one.more": proj}})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"0" * 10 ** 6)
    refuses(path.read_bytes())
    with pytest.raises(FileNotFoundError):
        load_clip(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="same merges"):
        CLIP(PRESETS["toy"], clip.tokenizer)
    assert not recwarn.list


# -- pretrain/clip.py

def test_style_words_are_all_that_is_left_of_a_caption():
    captions = ["a man in tuxedo in flat vector style", "a man in tuxedo", "a cat in sepia style"]
    source = SimpleNamespace(batch=lambda n, rng, resolution: ("images", captions))
    images, said = StyleWords(source).batch(3, None, 16)
    assert images == "images" and said == ["flat vector style", "a man in tuxedo", "sepia style"]
    turns = InTurn([0, 10, 20, 30, 40, 50], [0, 11, 21, 31, 41, 51])
    assert [turns[step] for step in (3, 4, 5)] == [31, 40, 51]   # the kind, and its batch, by the step


def test_augmented_pictures_are_seeded_and_some_only_mirrored():
    images = F.interpolate(random_images(400, 4), (16, 16), mode="bicubic").clamp(-1, 1)
    seen = augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(seen, augment(images, torch.Generator().manual_seed(0)))
    near = lambda a, b: ((a - b).abs().amax((1, 2, 3)) < 1e-4)
    same, mirrored = near(seen, images), near(seen, images.flip(3))
    assert 40 < same.sum() < 80 and 40 < mirrored.sum() < 80      # 30 % of 400, half of them mirrored
    assert seen.abs().max() <= 1
    colour = (seen.mean((2, 3)) - images.mean((2, 3))).abs()
    assert colour.mean() < 0.1 and colour.max() < 0.5             # red stays red


# -- experiments/score.py

def test_scores_of_a_folder(cli, weights, tmp_path):
    """Both scores with their standard errors, against the functions; files in the order of names."""
    (tmp_path / "drawn").mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures[:3]):
        Image.fromarray(picture).save(tmp_path / f"drawn/{i}.png")
    Image.fromarray(pictures[3]).save(tmp_path / "ref.png")
    (tmp_path / "prompts.txt").write_text("a cat\na house\na tree\n")
    command = ("--images", "drawn", "--ref", "ref.png", "--clip", weights / "clip.pt",
               "--prompts", "prompts.txt")
    code, out, _ = cli(score.main, *command)
    clip, images = load_clip(weights / "clip.pt"), to_tensor(pictures)
    text = text_score(clip, images[:3], ["a cat", "a house", "a tree"])
    style = style_score(clip, images[:3], images[3])
    line = lambda name, x: (f"{name} score {x.mean():.4f} +- {x.std() / 3 ** 0.5:.4f}  "
                            f"(3 pictures, by {weights / 'clip.pt'})")
    assert code == 0 and out.splitlines() == [line("text", text), line("style", style)]
    (tmp_path / "prompts.txt").write_text("a cat\na house\n")
    code, out, err = cli(score.main, *command)
    assert code == 2 and out == "" and "3 pictures" in err and "2 prompts" in err
