"""What a reference shows and in which words of style, where the user says neither.

CLIP names the content. The style is read by G, much as diffusion classifiers do (Li et al. 2023):
the best words are those that make the reference's tokens the likeliest, each at its place, and all
together wherever they are: a layout is no style. All are masked, since those that are seen would
tell G the rest, whatever the words. An adapter need not learn what the words say already.
"""

from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F

import data
from commandline import say
from data import styles
from styledrop import RARE_TOKEN, style_prompt

GAIN = 0.15                  # nats a token that a word has to bring
MOST = 4                     # references that are looked at for the style
ORDER = ("ground", "palette", "medium", "line", "light")     # of data.styles.ATTRIBUTES


def words_for(pipe, images, contents, style, earlier):
    """What the user left out, None: images (R, 3, H, W) -> R content phrases, style, and {what was
    guessed: the guess}, which is said.

    earlier: such a dict of a run on these images, or None. It counts: another machine might read
    other words, by a hair, and the run would not go on.
    """
    guessed, earlier = {}, earlier if isinstance(earlier, dict) else {}
    if contents is None:
        contents = earlier.get("content")
        if not (isinstance(contents, list) and len(contents) == len(images)):
            try:
                contents = guess_content(pipe, images)
            except (OSError, ValueError) as error:
                raise ValueError(f"{error}; or say with --content what is shown, and no CLIP is "
                                 "needed") from None
        guessed["content"] = contents = list(map(str, contents))
        say(f"content: {', '.join(contents)}, CLIP thinks (say it with --content if not)")
    if style is None:
        style = guessed["style"] = str(earlier.get("style") or guess_style(pipe, images, contents))
        said = "no words of the base fit" if style == RARE_TOKEN else "in the base's words"
        say(f"style: {style}, {said} (say it with --style if not)")
    return contents, style.strip(), guessed


def guess_content(pipe, images):
    """images (R, 3, H, W) in [-1, 1] -> of each the content phrase that CLIP finds nearest.

    G would be worse: it names drawings by hands that it knows, and no others.
    """
    phrases = sorted({data.content_phrase(name) for name in data.names()})
    texts = F.normalize(pipe.clip.encode_text(pipe.clip.tokenize(phrases)), dim=-1)
    scores = pipe.clip.encode_image(images.to(pipe.device)) @ texts.T            # (R, phrases)
    return [phrases[i] for i in scores.argmax(1)]


def guess_style(pipe, images, contents):
    """images (R, 3, H, W) in [-1, 1], R content phrases -> the words of the style they share.

    The best word for one attribute after the other, each beside those before it; then all of them
    once more, and those that do not bring GAIN go. Only words that the base has read. The rare
    token where none is left.
    """
    hands = [row["style"] for row in data.read_table("sets.tsv") if row["role"] == "training"]
    choices = styles.ATTRIBUTES | dict(medium=styles.ATTRIBUTES["medium"] + hands)
    side = pipe.vqgan.config.resolution
    small = F.interpolate(images[:MOST].to(pipe.device), (side, side), mode="area")
    tokens = pipe.vqgan.encode(small).flatten(1)                                 # (R, N)
    style, losses = styles.Style(), {}                                           # {phrase: loss}
    for gain, attribute in product((0, GAIN), ORDER):
        plain = getattr(styles.Style(), attribute)           # what goes without saying
        known = [value for value in choices[attribute] if pipe.words.issuperset(value.split())
                 and value not in styles.HELD_OUT.get(attribute, ())]    # a star is "glowing"
        tried = [replace(style, **{attribute: value}) for value in (plain, *known)]
        phrases = [styles.phrase(s) for s in tried]
        new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in losses]
        if new:                                              # none is where the words are as before
            found = sum(cross_entropy(pipe, ids, [style_prompt(content, phrase) for phrase in new])
                        / len(tokens) for ids, content in zip(tokens, contents))
            losses |= zip(new, found.tolist())
        best = min(range(len(tried)), key=lambda i: losses[phrases[i]])
        style = tried[best if losses[phrases[0]] - losses[phrases[best]] > gain else 0]
    return styles.phrase(style) or RARE_TOKEN


def cross_entropy(pipe, tokens, texts):
    """How unlikely tokens (N,) are for each of n texts, all of them masked: (n,), nats a token.

    The mean of two cross-entropies: CE_m of Eq. 2, each token at its place, and that of their
    histogram under the one G expects, which also serves where G would draw another layout.
    """
    masked = torch.full_like(tokens, pipe.muse.config.mask_id)
    losses = []
    for start in range(0, len(texts), 32):
        some = texts[start:start + 32]
        with torch.no_grad():
            logits = pipe.forward_pass(pipe.muse, some)(masked.expand(len(some), -1))
        p = logits.softmax(-1)                                                   # (B, N, V)
        placed = p.gather(2, tokens.expand(len(some), -1)[..., None])[..., 0]    # (B, N)
        anywhere = p.mean(1)[:, tokens]                                          # (B, N)
        losses.append(-(placed.log() + anywhere.log()).mean(1) / 2)
    return torch.cat(losses)
