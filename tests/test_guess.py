"""commandline.guess: content and style of a reference, read by a base whose taste is known."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from commandline.guess import guess_style, cross_entropy
from data import styles
from styledrop import RARE_TOKEN

SMALL = {"a", "in", "on", "with", "and", "ground", "style"}
IMAGES = torch.zeros(2, 3, 16, 16)
TOKENS = torch.full((16,), 3)


def base_that_knows(truth, gain=0.5, power=1):
    """G finds the tokens the likelier, the more words of `truth` a text has, and no others."""
    def forward_pass(G, texts):
        words, wanted = [set(text.split()) - SMALL for text in texts], set(truth.split()) - SMALL
        worth = torch.tensor([len(some & wanted) ** power - len(some - wanted) for some in words])

        def forward(ids):
            assert (ids == G.config.mask_id).all()           # all is masked: only the text speaks
            return gain * worth[:, None, None] * F.one_hot(TOKENS, 16).float()
        return forward

    words = {word for values in styles.ATTRIBUTES.values() for word in " ".join(values).split()}
    return SimpleNamespace(
        words=words | {"flat", "vector"}, device="cpu",
        muse=SimpleNamespace(config=SimpleNamespace(mask_id=16)),
        vqgan=SimpleNamespace(config=SimpleNamespace(resolution=16),
                              encode=lambda images: TOKENS.expand(len(images), -1)),
        forward_pass=forward_pass)


def test_style_has_the_words_that_make_the_tokens_likely():
    """What several references share, contents aside. Trap: words bring GAIN only together."""
    for words, *how in (("pixel art with drop shadow on gold",), ("flat vector on red",),
                        ("thick red outline on black",), ("sepia",), ("flat on red", 3e-3, 4)):
        pipe = base_that_knows(f"a cat house in {words}", *how)
        assert guess_style(pipe, IMAGES, ["a cat", "a house"]) == words


def test_a_word_has_to_bring_something():
    """Trap: some word always fits best. Where none brings GAIN, the rare token is the name."""
    assert guess_style(base_that_knows("a cat in sepia", 0.01), IMAGES[:1], ["a cat"]) == RARE_TOKEN


def test_only_words_of_the_base_are_tried():
    """Traps: a word that the base never read; a star that glows is no glowing style."""
    pipe = base_that_knows("a cat in sepia glowing on gold")
    pipe.words = pipe.words - {"sepia"}
    assert guess_style(pipe, IMAGES[:1], ["a cat"]) == "gold ground"


def test_cross_entropy_is_of_the_tokens_and_of_their_histogram(pipe):
    """By hand, one text after the other. Trap: unmasked tokens would tell G the answer."""
    tokens, texts = torch.randint(32, (16,)), ["a cat", "a house in watercolor"] * 20
    masked = torch.full((1, 16), pipe.muse.config.mask_id)
    by_hand = []
    for text in texts:
        logits = pipe.muse(masked, *pipe.embed(pipe.muse, [text]))[0]            # (N, V)
        placed = F.cross_entropy(logits, tokens)
        histogram = sum(row.softmax(0) for row in logits) / 16                   # (V,)
        by_hand.append((placed - sum(histogram[token].log() for token in tokens) / 16) / 2)
    assert torch.allclose(cross_entropy(pipe, tokens, texts), torch.stack(by_hand), atol=1e-4)
