"""clip_feedback.py: byte-level BPE, the two towers, scores and selection.

Files of CLIP weights: test_checkpoint.py.
"""

import gzip
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TOKENIZER, noise_images, seeded

from clip_feedback import (BYTES, CLIP, LONGEST_WORD, OPENAI_PIXELS, PRESETS, VOCABULARY_FILE,
                           Tokenizer, select_best, split_words, style_score, text_score)
from pretrain.common import train_merges

VIT = dict(vision_layers=2, vision_width=32, vision_heads=2)         # the other kind of image tower


def toy(**changes):
    config = replace(PRESETS["toy"], vocab_size=TOKENIZER.vocab_size, **changes)
    return seeded(lambda: CLIP(config, TOKENIZER)).eval()


@pytest.fixture
def clip():
    return toy()


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# -- the tokenizer

def words_of(text):
    """The words that a text is split into, as text again instead of byte symbols."""
    byte_of = {symbol: byte for byte, symbol in BYTES.items()}
    words = []
    for word in split_words(text):
        symbols = "".join(word).removesuffix("</w>")
        words.append(bytes(byte_of[symbol] for symbol in symbols).decode())
    return words


TEXTS = [
    ("  A   Cat's\n\tHAT ", ["a", "cat", "'s", "hat"]),
    ("they'LL 2024 don't!?", ["they", "'ll", "2", "0", "2", "4", "don", "'t", "!?"]),
    ("< salt &amp;amp; pepper", ["<", "salt", "&", "pepper"]),       # escaped twice
    ("“quoted” cafÃ©", ['"', "quoted", '"', "café"]),                # ftfy repairs broken UTF-8
    ("熱気球 🎈", ["熱気球", "🎈"]), ("", [])]


@pytest.mark.parametrize("text, words", TEXTS)
def test_cleaning_and_splitting(text, words):
    assert words_of(text) == words


@pytest.mark.parametrize("text, words", TEXTS)
def test_no_text_is_unknown(text, words):
    """The ids of a text hold its bytes."""
    symbols = [TOKENIZER.symbols[i] for i in TOKENIZER.encode(text)]
    expected = ["".join(word) for word in split_words(text)]
    assert "".join(symbols) == "".join(expected)


def merges_by_recounting(texts, n_merges):
    """BPE merges, slow and plain: every merge is followed by a new count of everything."""
    words = []
    for text in texts:
        words += [list(word) for word in split_words(text)]
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for word in words:
            counts.update(zip(word, word[1:]))
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


CORPUS = ["a hot air balloon", "a hot dog", "the cat sat on the mat", "the hat", "aaaa aaa"] * 2
CORPUS += ["banana bananas 🎈🎈", "mississippi mmm"]


@pytest.mark.parametrize("n_merges", [0, 1, 40, 10 ** 6])
def test_merges_equal_those_of_a_plain_count(n_merges):
    """With enough merges, every word becomes one symbol and the rest is left out."""
    assert train_merges(CORPUS, n_merges) == merges_by_recounting(CORPUS, n_merges)


def test_merges_do_not_depend_on_the_order_of_texts():
    assert train_merges(CORPUS[::-1], 40) == train_merges(CORPUS, 40)


def test_merges_can_be_extended():
    """A vocabulary grows for new words; the merges that were there stay in front."""
    before = train_merges(CORPUS, 20)
    grown = train_merges([*CORPUS, "zebra zebras"], 10 ** 6, before)
    assert grown[:20] == before
    assert len(set(grown)) == len(grown)
    tokenizer = Tokenizer(grown)
    for word in ("zebra", "zebras", "balloon"):
        assert len(tokenizer.encode(word)) == 1
    assert len(Tokenizer(before).encode("zebra")) > 1


def test_merges_are_extended_by_the_number_that_is_asked_for():
    before = train_merges(CORPUS, 20)
    assert train_merges(CORPUS, 5, before) == train_merges(CORPUS, 25)
    assert train_merges(CORPUS, 0, before) == before


def test_encode_applies_merges_in_the_order_they_were_learned():
    tokenizer = Tokenizer(["b c", "a b", "a bc", "d </w>"])
    symbols = [tokenizer.symbols[i] for i in tokenizer.encode("abcb ab")]
    assert symbols == ["abc", "b</w>", "a", "b</w>"]


def test_the_vocabulary_is_laid_out_as_clips():
    tokenizer = Tokenizer(["b c", "a b", "a bc", "d </w>"])
    assert tokenizer.vocab_size == 512 + 4 + 2
    first = [tokenizer.symbols[i] for i in (0, 93, 94, 255, 256)]
    assert first == ["!", "~", "¡", "Ń", "!</w>"]


def test_a_batch_has_starts_ends_and_zeros():
    start, end = TOKENIZER.start_id, TOKENIZER.end_id
    cat, long = TOKENIZER.encode("a cat"), TOKENIZER.encode("a teapot " * 9)
    ids = TOKENIZER(["a cat", "a teapot " * 9, ""], 8).tolist()
    assert ids[0] == [start, *cat, end] + [0] * (6 - len(cat))
    assert ids[1] == [start, *long[:6], end]
    assert ids[2] == [start, end] + [0] * 6


def test_whether_a_text_fits():
    length = len(TOKENIZER.encode("a cat")) + 2
    assert TOKENIZER.fits("a cat", length)
    assert not TOKENIZER.fits("a cat", length - 1)


def test_the_rest_of_a_very_long_word_is_left_out(calls):
    """Trap: a word of 100,000 letters takes a minute. What a model reads of it stays the same."""
    longest = "catepot" * (LONGEST_WORD // 7)                # nothing of it is left out
    text = longest + "house" * 20_000
    tokenizer = Tokenizer(TOKENIZER.merges)
    asked = calls(tokenizer, "pieces")
    ids = tokenizer(["a " + text + " owl", "a " + longest + " owl"], 77)
    assert torch.equal(ids[0], ids[1])
    assert max(len(word) for (word,), _ in asked) == LONGEST_WORD
    assert tokenizer.encode("a cat") == TOKENIZER.encode("a cat")


def test_an_end_token_in_a_prompt_is_plain_text():
    """Trap: CLIP's own reads it, and a prompt can end early."""
    ids = TOKENIZER("a <|endoftext|> cat", 32)
    assert (ids == TOKENIZER.end_id).sum() == 1
    assert ids.argmax() > 5


@pytest.fixture
def vocabulary(tmp_path):
    return tmp_path / VOCABULARY_FILE


def test_openai_vocabulary_file(vocabulary):
    lines = ["a header line", "a t", "c at</w>", "h at</w>", ""]
    vocabulary.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert Tokenizer(vocabulary).merges == [("a", "t"), ("c", "at</w>"), ("h", "at</w>")]


def test_openai_vocabulary_file_lists_more_than_clip_uses(vocabulary):
    vocabulary.write_bytes(gzip.compress(b"header\n" + b"a b\n" * 60000))
    assert Tokenizer(vocabulary).vocab_size == 49408


WHOLE = gzip.compress(b"header\n" + b"a b\n" * 60000)


@pytest.mark.parametrize("content", [
    b"no gzip", gzip.compress(b"header\none two three"), gzip.compress(b"\xff\xfe"), WHOLE[:-9],
    WHOLE[:12] + b"\xff" * 9])
def test_damaged_vocabulary_files(vocabulary, content):
    vocabulary.write_bytes(content)
    with pytest.raises(ValueError, match="^[^\n]*not a CLIP vocabulary file[^\n]*$"):
        Tokenizer(vocabulary)


@pytest.mark.parametrize("merges", [7, ["a"], ["a b c"], [["a", 7]], [("a" * 999, "b")]], ids=str)
def test_wrong_merges(merges):
    with pytest.raises(ValueError, match="merges must be pairs of symbols"):
        Tokenizer(merges)


# -- the two towers

def torchs_layer(block, activation):
    """PyTorch's own pre-norm transformer layer with the weights of one of ours."""
    layer = torch.nn.TransformerEncoderLayer(32, 2, 128, 0.0, activation, batch_first=True,
                                             norm_first=True)
    names = {"attn.": "self_attn.", "ln_1.": "norm1.", "ln_2.": "norm2.", "mlp.c_fc.": "linear1.",
             "mlp.c_proj.": "linear2."}
    weights = {}
    for name, weight in block.state_dict().items():
        for ours, torchs in names.items():
            if name.startswith(ours):
                weights[torchs + name.removeprefix(ours)] = weight
    layer.load_state_dict(weights)
    return layer


def quick_gelu(x):
    return x * (1.702 * x).sigmoid()


@pytest.mark.parametrize("activation", [F.gelu, quick_gelu])
def test_image_tower_equals_torchs_layers(activation):
    clip = toy(quick_gelu=activation is quick_gelu, **VIT)
    visual, images = clip.visual, noise_images(2)
    patches = F.unfold(images, 8, stride=8).transpose(1, 2) @ visual.conv1.weight.flatten(1).T
    x = torch.cat([visual.class_embedding.expand(2, 1, 32), patches], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding)
    for block in visual.transformer.resblocks:
        x = torchs_layer(block, activation)(x)
    expected = visual.ln_post(x)[:, 0] @ visual.proj
    assert_close(clip.encode_image(images), expected)


@pytest.mark.parametrize("activation", [F.gelu, quick_gelu])
def test_text_tower_equals_torchs_layers(activation):
    """With a causal mask; the feature is the end token's state."""
    clip = toy(quick_gelu=activation is quick_gelu, **VIT)
    ids = clip.tokenize(["a cat", "a house"])
    mask = torch.full((16, 16), -math.inf).triu(1)
    x = clip.token_embedding.weight[ids] + clip.positional_embedding
    for block in clip.transformer.resblocks:
        x = torchs_layer(block, activation)(x, src_mask=mask)
    ends = [row.tolist().index(clip.tokenizer.end_id) for row in ids]
    expected = clip.ln_final(x)[[0, 1], ends] @ clip.text_projection
    assert_close(clip.encode_text(ids), expected)


@pytest.fixture
def resnet(clip):
    """The toy image tower, with running statistics that have an effect."""
    chance = torch.Generator().manual_seed(0)
    for name, buffer in clip.visual.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2, generator=chance)
    return clip.visual


def test_resnet_equals_plain_operations(resnet):
    """Shortcuts, strides, and the averages of both stages."""
    weights = resnet.state_dict()

    def conv_norm(x, name, stride=1):
        kernel = weights[f"{name}.0.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
        return (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()    # gain 1, bias 0

    x = conv_norm(noise_images(2), "stem.0", 2).relu()
    x = conv_norm(x, "stem.2").relu()
    one = conv_norm(x, "stages.0.0.conv1").relu()
    one = (x + conv_norm(one, "stages.0.0.conv2")).relu()
    two = conv_norm(one, "stages.1.0.conv1", 2).relu()
    two = conv_norm(two, "stages.1.0.conv2")
    two = (two + conv_norm(F.avg_pool2d(one, 2), "stages.1.0.shortcut")).relu()
    assert one.shape == (2, 8, 8, 8) and two.shape == (2, 16, 4, 4)
    x = torch.cat([one.mean((2, 3)), two.mean((2, 3))], dim=1)
    x = (x - weights["norm.running_mean"]) / (weights["norm.running_var"] + 1e-5).sqrt()
    assert_close(resnet(noise_images(2)), x @ weights["proj"])


def test_a_feature_does_not_depend_on_its_batch(clip):
    """Trap: a batch norm that is left in training mode."""
    images = noise_images(2)
    assert_close(clip.encode_image(images)[1:], clip.encode_image(images[1:]))


def test_images_are_cropped_to_their_centre(clip):
    image = noise_images(1)
    white = torch.ones(1, 3, 16, 8)
    wide = torch.cat([white, image, white], dim=3)
    assert_close(clip.prepare(wide), clip.prepare(image))


def test_images_of_any_size_are_resampled(clip):
    assert clip.encode_image(noise_images(2, 40)).shape == (2, clip.config.embed_dim)


def test_pixels_are_scaled_as_the_config_says(clip):
    """Ours reads [-1, 1] as it is. OpenAI's values of white are from its own code."""
    assert_close(clip.prepare(noise_images(1)), noise_images(1))
    clip.config = replace(clip.config, **OPENAI_PIXELS)
    white = clip.prepare(torch.ones(1, 3, 33, 33))[0, :, 3, 5]
    assert white.tolist() == pytest.approx([1.9303, 2.0749, 2.1459], abs=1e-3)


def test_the_paper_preset_has_the_size_of_vit_l_14():
    """CLIP, Table 20."""
    with torch.device("meta"):
        weights = CLIP(PRESETS["paper"]).state_dict().values()
    assert sum(weight.numel() for weight in weights) == 427_616_513


@pytest.mark.parametrize("changes, words", [
    (dict(vocab_size=600), "give both the same merges"), (dict(patch=99), "patch must be"),
    (dict(image_mean=(0.5,)), "three numbers")])
def test_configs_that_do_not_fit(changes, words):
    config = replace(PRESETS["toy"], **dict(vocab_size=TOKENIZER.vocab_size) | changes)
    with pytest.raises(ValueError, match=words):
        CLIP(config, TOKENIZER)


# -- scores and selection

TEXTS_OF_IMAGES = ["a cat", "a tree", "a cat"]


def test_text_score_is_a_plain_cosine(clip):
    images = noise_images(3)
    texts = clip.encode_text(clip.tokenize(TEXTS_OF_IMAGES))
    expected = F.cosine_similarity(clip.encode_image(images), texts).detach()
    assert_close(text_score(clip, images, TEXTS_OF_IMAGES), expected)
    assert_close(text_score(clip, images, "a cat")[2:], expected[2:])


def test_style_score_is_the_mean_cosine_of_the_references(clip):
    images, references = noise_images(3), noise_images(2, 9)
    features = clip.encode_image(images)[:, None]                            # (3, 1, E)
    cosines = F.cosine_similarity(features, clip.encode_image(references), dim=-1).detach()
    assert_close(style_score(clip, images, references), cosines.mean(1))
    assert_close(style_score(clip, images, references[0]), cosines[:, 0])


def test_scores_do_not_depend_on_lengths_and_temperature(clip):
    images = noise_images(3)
    scores = text_score(clip, images, TEXTS_OF_IMAGES)
    with torch.no_grad():
        clip.visual.proj.mul_(3)
        clip.text_projection.mul_(5)
        clip.logit_scale.fill_(0.0)
    assert_close(text_score(clip, images, TEXTS_OF_IMAGES), scores)


def test_what_cannot_be_scored(clip):
    with pytest.raises(ValueError, match="3 images but 2 texts"):
        text_score(clip, noise_images(3), ["a", "b"])
    with pytest.raises(ValueError, match="no tokenizer"):
        CLIP(PRESETS["toy"]).tokenize("a cat")


def test_a_text_that_is_too_long_is_reported(clip):
    with pytest.warns(UserWarning, match="only the first 14 tokens"):
        text_score(clip, noise_images(3), "a teapot " * 20)


def test_selection():
    """Each prompt's highest scores, the best first."""
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.5, -0.2, 0.4]])
    assert select_best(scores).tolist() == [[1], [0]]
    assert select_best(scores, k=2).tolist() == [[1, 2], [0, 2]]


@pytest.mark.parametrize("scores, k", [
    (torch.zeros(2, 3), 4), (torch.zeros(2, 3), 0), (torch.zeros(3), 1),
    (torch.tensor([[0.0, math.nan]]), 1), (torch.tensor([[0.0, math.inf]]), 1)])
def test_what_cannot_be_selected(scores, k):
    with pytest.raises(ValueError, match="cannot pick|not finite"):
        select_best(scores, k)
