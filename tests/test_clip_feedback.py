"""clip_feedback.py: byte-level BPE, the two towers, the contrastive loss, files, scores and selection."""

import gzip
import math
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

import clip_feedback
from clip_feedback import (CLIP, OPENAI_PIXELS, PRESETS, VOCABULARY_FILE, Attention, CLIPConfig, Tokenizer,
                           contrastive_loss, load_clip, select_best, select_random, split_words,
                           style_score, text_score, train_merges)

CORPUS = ["a hot air balloon in flat vector style", "a hot dog", "a balloon animal", "the cat sat on the mat",
          "a cat in watercolor style", "blue and gold watercolor on black", "a cat and a balloon", "the hat"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_merges(CORPUS, 40))


@pytest.fixture
def clip(tokenizer):
    torch.manual_seed(0)
    return CLIP(replace(PRESETS["toy"], vocab_size=tokenizer.vocab_size), tokenizer).eval()


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
    assert Tokenizer(path).merges == Tokenizer(merges).merges == [("a", "t"), ("c", "at</w>"), ("h", "at</w>")]
    with gzip.open(path, "wt") as file:
        file.write("header\n" + "a b\n" * 60000)
    assert Tokenizer(path).vocab_size == 49408  # the file lists more merges than CLIP uses
    for content in (b"no gzip", gzip.compress(b"header\none two three"), gzip.compress(b"\xff\xfe"),
                    gzip.compress(b"h\na b")[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^[^\n]*not a CLIP vocabulary file[^\n]*$"):
            Tokenizer(path)


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
    """Both towers again, from PyTorch's own pre-norm layer with the same weights."""
    torch.manual_seed(0)
    config = replace(PRESETS["toy"], vocab_size=tokenizer.vocab_size, quick_gelu=quick_gelu)
    clip = CLIP(config, tokenizer).eval()
    activation = (lambda x: x * (1.702 * x).sigmoid()) if quick_gelu else F.gelu
    names = {"attn.": "self_attn.", "ln_1.": "norm1.", "ln_2.": "norm2.", "mlp.c_fc.": "linear1.",
             "mlp.c_proj.": "linear2."}

    def run(tower, x, mask=None):
        for block in tower.resblocks:
            layer = torch.nn.TransformerEncoderLayer(32, 2, 128, 0., activation, batch_first=True, norm_first=True)
            layer.load_state_dict({new + name.removeprefix(old): w for name, w in block.state_dict().items()
                                   for old, new in names.items() if name.startswith(old)})
            x = layer(x, src_mask=mask)
        return x

    images, ids, visual = random_images(2), clip.tokenize(["a cat", "a hot air balloon"]), clip.visual
    patches = F.unfold(images, 8, stride=8).transpose(1, 2) @ visual.conv1.weight.flatten(1).T  # (B, N, D)
    x = torch.cat([visual.class_embedding.expand(2, 1, 32), patches], dim=1) + visual.positional_embedding
    expected = visual.ln_post(run(visual.transformer, visual.ln_pre(x)))[:, 0] @ visual.proj
    torch.testing.assert_close(clip.encode_image(images), expected, rtol=1e-4, atol=1e-5)
    mask = torch.full((16, 16), -math.inf).triu(1)
    states = clip.ln_final(run(clip.transformer, clip.token_embedding.weight[ids] + clip.positional_embedding, mask))
    torch.testing.assert_close(clip.text_states(ids, -1), states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("degrees, way", [(0, 0), (45, 2), (90, 4), (135, 6)])
def test_gradients_are_told_apart_by_where_they_point(degrees, way):
    """Waves across `degrees`: their gradient points there, at every scale, and the same however faint they are."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    angle = torch.tensor(degrees / 180 * math.pi)
    wave = torch.sin((x * angle.cos() + y * angle.sin()) / 2).expand(1, 3, 64, 64)
    cells, statistics = clip_feedback.describe(torch.cat([wave, wave * 0.7]))
    for scale in range(3):
        ways = cells[:, 3 + 9 * scale:11 + 9 * scale, 2:-2, 2:-2]                # (2, 8, 4, 4)
        assert (ways.argmax(1) == way).all() and (ways[0] - ways[1]).abs().max() < 0.1
    assert statistics.shape == (2, 9 * 8 + 447)


def test_statistics_know_no_places():
    """The thing elsewhere on the ground: the same statistics, and other cells."""
    image = -torch.ones(1, 3, 64, 64)
    image[:, :, 16:32, 8:24] = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    here, there = clip_feedback.describe(image), clip_feedback.describe(image.roll((16, 24), (2, 3)))
    torch.testing.assert_close(here[1], there[1], atol=1e-4, rtol=1e-3)
    assert (here[0] - there[0]).abs().max() > 0.5
    assert here[1][:, -432:].square().sum().item() == pytest.approx(2, abs=1e-3)                   # two histograms


def gradient_clip(tokenizer):
    torch.manual_seed(0)
    return CLIP(replace(clip_feedback.PRESETS["toy"], vocab_size=tokenizer.vocab_size, vision_layers=0), tokenizer)


def test_gradient_tower_learns_shapes_in_any_colour(tokenizer):
    """Stripes and columns, each pair of colours new: told apart after a few steps, in colours it never met."""
    clip, g = gradient_clip(tokenizer), torch.Generator().manual_seed(0)
    ids = clip.tokenize(["a cat", "a hot air balloon"]).repeat(8, 1)
    optimiser = torch.optim.AdamW(clip.parameters(), 3e-3)

    def batch():
        bars = (torch.arange(16) // 2 % 2).float().expand(16, 16)
        shape = torch.stack([bars, bars.T]).repeat(8, 1, 1)[:, None]                        # (16, 1, 16, 16)
        one, two = torch.rand(2, 16, 3, 1, 1, generator=g) * 2 - 1
        return shape * one + (1 - shape) * two

    for _ in range(30):
        loss, _ = clip(batch(), ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    clip.eval()
    assert sum(clip(batch(), ids)[1].item() for _ in range(10)) / 10 > 0.95


def test_gradient_tower_scores_each_picture_alone(tokenizer):
    """In eval mode a picture's feature does not hang on its batch, nor on chance. Trap: left in training mode."""
    clip, images = gradient_clip(tokenizer).eval(), random_images(4)
    torch.testing.assert_close(clip.encode_image(images)[2:3], clip.encode_image(images[2:3]), rtol=1e-4, atol=1e-5)
    assert torch.equal(clip.encode_image(images), clip.encode_image(images))
    assert clip.encode_image(random_images(2).repeat_interleave(4, 2).repeat_interleave(4, 3)).shape == (2, 24)


def test_text_states_do_not_see_later_tokens(clip):
    ids = clip.tokenize(["a hot air balloon"])
    other = ids.clone()
    other[0, 4] = 7
    for layer in (-1, -2):
        a, b = clip.text_states(ids, layer), clip.text_states(other, layer)
        assert a.shape == (1, clip.config.context_length, clip.config.text_width)
        torch.testing.assert_close(a[:, :4], b[:, :4], rtol=0, atol=1e-6)
        assert (a[:, 4:] - b[:, 4:]).abs().amax(-1).min() > 1e-4


def test_text_states_layers(clip):
    ids = clip.tokenize(["a cat"])
    below = clip.text_states(ids, -2)
    torch.testing.assert_close(clip.text_states(ids, -1), clip.ln_final(clip.transformer.resblocks[-1](below)))
    for layer in (-1, -2):
        clip.config.states_layer = layer
        assert torch.equal(clip.text_states(ids), clip.text_states(ids, layer))
    for layer in (0, -3):
        with pytest.raises(ValueError, match="layer must lie in -2..-1"):
            clip.text_states(ids, layer)


def test_padding_does_not_change_text_features(clip):
    ids = clip.tokenize(["a cat"])
    length = int(ids.argmax()) + 1
    longer = clip.tokenize(["a cat", "a hot air balloon in flat"])
    junk = ids.clone()
    junk[:, length:] = 5
    for other in (ids[:, :length], longer[:1], longer, junk):
        torch.testing.assert_close(clip.encode_text(other)[:1], clip.encode_text(ids), rtol=1e-5, atol=1e-6)


def test_text_feature_is_the_state_at_the_end_token(clip):
    ids = clip.tokenize(["a cat", "a hot air balloon"])
    states, features = clip.text_states(ids, -1), clip.encode_text(ids)
    for i in range(2):
        end = ids[i].tolist().index(clip.tokenizer.end_id)
        torch.testing.assert_close(features[i], states[i, end] @ clip.text_projection)
        assert clip.text_mask(ids)[i].tolist() == [j <= end for j in range(clip.config.context_length)]


def test_a_new_image_tower_starts_on_features_that_use_their_space(clip):
    """Whitened over the captions: no direction of the features is shorter than another. The states stay. Trap: the
    smallest directions kept where E < D."""
    texts = [f"{a} {b} {c}" for a in ("a", "the", "my") for b in ("red", "blue", "big", "old") for c in ("cat", "house", "owl", "tree")]
    ids = clip.tokenizer(texts, clip.config.context_length)
    states, image = clip.text_states(ids), torch.rand(2, 3, 16, 16)
    features = clip.encode_image(image)
    directions = torch.linalg.svd(clip.end_states(ids)).Vh[:clip.config.embed_dim]
    clip.start_images(ids)
    spread = torch.linalg.svdvals(clip.encode_text(ids)) / len(ids) ** 0.5
    assert spread[0] <= 1.001 and spread[11] > 0.9                               # D = 32, E = 24; a dozen that vary at all
    assert torch.allclose(clip.text_projection.T @ directions.T @ directions, clip.text_projection.T, atol=1e-2)
    assert torch.equal(clip.text_states(ids), states) and not torch.allclose(clip.encode_image(image), features)


def test_images_of_any_shape_are_cropped_and_resampled(clip):
    image = random_images(1)
    torch.testing.assert_close(clip.prepare(image), image)  # our weights read [-1, 1] as it is
    wide = torch.cat([torch.ones(1, 3, 16, 8), image, torch.ones(1, 3, 16, 8)], dim=3)
    torch.testing.assert_close(clip.encode_image(wide), clip.encode_image(image))
    assert clip.encode_image(random_images(2, 40)).shape == (2, clip.config.embed_dim)
    clip.config = replace(clip.config, **OPENAI_PIXELS)
    white = clip.prepare(torch.ones(1, 3, 33, 33))
    torch.testing.assert_close(white[0, :, 3, 5], torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-3, rtol=0)


def test_presets_have_the_published_size():
    with torch.device("meta"):
        count = sum(p.numel() for p in CLIP(PRESETS["paper"]).parameters())
    assert count == 427_616_513  # ViT-L/14 (CLIP Table 20 lists its widths and depths)


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


def test_forward_finds_duplicates_and_clamps_the_scale(clip):
    images, ids = random_images(3), clip.tokenize(["a cat", "a cat", "the hat"])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    with torch.no_grad():
        clip.logit_scale.fill_(9.)
    loss, accuracy = clip(images, ids)
    assert clip.logit_scale.exp().item() == pytest.approx(100)
    expected = contrastive_loss(clip.encode_image(images), clip.encode_text(ids), torch.tensor(100.).log(), same)
    torch.testing.assert_close(loss, expected)


def test_a_few_steps_learn_to_tell_pictures_apart(clip):
    images = torch.stack([torch.full((3, 16, 16), v) for v in (-1., 0., 1.)]) + random_images(3) * 0.1
    ids = clip.tokenize(["a cat", "the hat", "a balloon"])
    optimiser = torch.optim.AdamW(clip.parameters(), 1e-3)
    for _ in range(30):
        loss, accuracy = clip(images, ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2 and accuracy == 1
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
    weights = {name: w.half() if half else w for name, w in clip.state_dict().items()}
    merges = [" ".join(pair) for pair in clip.tokenizer.merges]
    torch.save(dict(config=asdict(clip.config), weights=weights, merges=merges, provenance=provenance or {}), path)


def test_checkpoint_round_trip_is_exact(clip, tmp_path):
    clip.config.states_layer = -2
    save_clip(tmp_path / "clip.pt", clip, dict(steps=7))
    loaded = load_clip(tmp_path / "clip.pt")
    assert loaded.config == clip.config and loaded.tokenizer.merges == clip.tokenizer.merges
    assert loaded.provenance == dict(steps=7) and not loaded.training
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in clip.state_dict().items())
    assert torch.equal(text_score(clip, random_images(2), "a cat"), text_score(loaded, random_images(2), "a cat"))
    save_clip(tmp_path / "half.pt", clip, half=True)
    loaded = load_clip(tmp_path / "half.pt")
    assert loaded.visual.proj.dtype == torch.float32
    assert torch.equal(loaded.visual.proj, clip.visual.proj.half().float())


@pytest.fixture
def foreign(tokenizer):
    """A CLIP in OpenAI's proportions: 64 wide heads, quick GELU, weights that are exact in fp16."""
    torch.manual_seed(0)
    config = CLIPConfig(resolution=28, patch=14, vision_width=128, vision_layers=3, vision_heads=2, text_width=64,
                        text_layers=2, text_heads=1, context_length=12, vocab_size=tokenizer.vocab_size,
                        embed_dim=40, quick_gelu=True, **OPENAI_PIXELS)
    return CLIP(config, tokenizer).half().float().eval()


@pytest.mark.filterwarnings("ignore")  # tracing warns of shapes that become constants, and of its own age
@pytest.mark.parametrize("layout", ["openai", "open_clip", "archive"])
def test_foreign_weights_load_with_an_inferred_config(foreign, layout, tmp_path):
    path, vocabulary = tmp_path / "ViT.pt", tmp_path / VOCABULARY_FILE
    if layout == "openai":
        sizes = dict(input_resolution=torch.tensor(28), context_length=torch.tensor(12), vocab_size=torch.tensor(600))
        torch.save({**foreign.half().state_dict(), **sizes}, path)
    elif layout == "open_clip":
        torch.save(dict(epoch=3, state_dict={f"module.{k}": w for k, w in foreign.state_dict().items()}), path)
    else:
        torch.jit.trace_module(foreign, dict(encode_image=random_images(1, 28)), check_trace=False).save(path)
    foreign.float()
    with gzip.open(vocabulary, "wt", encoding="utf-8") as file:
        file.write("\n".join(["header", *(" ".join(pair) for pair in foreign.tokenizer.merges), ""]))
    loaded = load_clip(path, quick_gelu=True if layout == "open_clip" else None)  # finds the vocabulary beside it
    assert loaded.config == foreign.config
    images, texts = random_images(2, 50), ["a cat", "the hat"]
    assert torch.equal(text_score(loaded, images, texts), text_score(foreign, images, texts))
    vocabulary.rename(tmp_path / "elsewhere.gz")
    assert load_clip(path).tokenizer is None
    assert load_clip(path, merges=tmp_path / "elsewhere.gz").tokenizer.merges == foreign.tokenizer.merges
    if layout == "open_clip":
        assert not load_clip(path).config.quick_gelu


def test_damaged_or_foreign_files_are_refused_in_one_line(clip, tmp_path):
    path = tmp_path / "clip.pt"
    save_clip(path, clip)
    whole = path.read_bytes()
    broken = torch.load(path, weights_only=True)

    def refuses(content):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError) as error:
            load_clip(path)
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    for content in (b"", b"hello", whole[:200], whole[:len(whole) // 2], whole[:-30], b"\0" * 500,
                    b"PK\x03\x04" + b"\1" * 99):
        refuses(content)
    refuses([1, 2])
    refuses({"state_dict": 3})
    refuses({"layer1.weight": torch.ones(2)})
    refuses({**broken, "config": {**broken["config"], "colour": 1}})
    refuses({**broken, "config": {**broken["config"], "text_layers": 3}})
    refuses({**broken, "config": {**broken["config"], "embed_dim": 25}})
    refuses({**broken, "merges": broken["merges"][:-1]})
    refuses({**broken, "weights": None})
    with pytest.raises(FileNotFoundError):
        load_clip(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="same merges"):
        CLIP(PRESETS["toy"], clip.tokenizer)


# -- the command

def test_scores_of_a_folder(cli, weights, tmp_path):
    """Both scores with their standard errors and the scorer's name, against the functions; files in the order of names."""
    import numpy as np
    from PIL import Image

    from styledrop import to_tensor
    (tmp_path / "drawn").mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures[:3]):
        Image.fromarray(picture).save(tmp_path / f"drawn/{i}.png")
    Image.fromarray(pictures[3]).save(tmp_path / "ref.png")
    (tmp_path / "prompts.txt").write_text("a cat\na house\na tree\n")
    command = ("--images", "drawn", "--ref", "ref.png", "--clip", weights / "clip.pt", "--prompts", "prompts.txt")
    code, out, _ = cli(clip_feedback.main, *command)
    clip, images = clip_feedback.load_clip(weights / "clip.pt"), to_tensor(pictures)
    text = clip_feedback.text_score(clip, images[:3], ["a cat", "a house", "a tree"])
    style = clip_feedback.style_score(clip, images[:3], images[3])
    line = lambda name, x: f"{name} score {x.mean():.4f} +- {x.std() / 3 ** 0.5:.4f}  (3 pictures, by {weights / 'clip.pt'})"
    assert code == 0 and out.splitlines() == [line("text", text), line("style", style)]
    (tmp_path / "prompts.txt").write_text("a cat\na house\n")
    code, out, err = cli(clip_feedback.main, *command)
    assert code == 2 and out == "" and "3 pictures" in err and "2 prompts" in err
