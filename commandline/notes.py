"""Notes about prompts: words that no training caption contains, and text that is cut off."""

import difflib
import re

from .terminal import note

MOST = 20                               # no more unknown words than this are listed
TEMPLATE = {"in", "style", "[v*]", "[v]"}                    # words of "in S style", rare tokens


def words_of(text):
    """The words of a text, in lower case and without punctuation."""
    return re.findall(r"[^\s,.;:!?\"]+", text.lower())


def unknown_words(words, text):
    """A dict from each word of `text` that is not in `words` to at most three similar `words`.

    Stops after MOST unknown words. Only the first 40 letters of each are compared.
    """
    unknown = {}
    for word in words_of(text):
        if word in words or word in unknown:
            continue
        if len(unknown) == MOST:
            break
        unknown[word] = near_words(words, word[:40])
    return unknown


def near_words(words, word):
    """Up to three known words that are spelled like `word`, contain it, or are contained in it."""
    near = difflib.get_close_matches(word, sorted(words), 3, 0.75)
    if len(word) > 2:
        inside = [known for known in words
                  if len(known) > 2 and (known in word or word in known)]
        inside.sort(key=lambda known: (abs(len(known) - len(word)), known))
        near += inside
    return list(dict.fromkeys(near))[:3]


def note_unknown(pipe, *texts):
    """Print notes on what the base of `pipe` (a StyleDrop) does not understand in some texts.

    That is text beyond the last token that T reads, and words that no training caption contains.
    """
    length = pipe.muse.config.text_length
    if not all(pipe.tokenizer.fits(text, length) for text in texts):
        note(f"a prompt is longer than {length} tokens; its end is ignored")
    if not pipe.words:
        return
    unknown = unknown_words(pipe.words | TEMPLATE, " ".join(texts))
    for word, near in unknown.items():
        excerpt = word if len(word) < 50 else word[:40] + "..."
        suggestion = f"; similar known words: {', '.join(near)}" if near else ""
        note(f"the base does not know {excerpt!r}{suggestion}")
    if len(unknown) == MOST:
        note("there may be more words that the base does not know")


def knows_some(pipe, phrase):
    """Does the base know at least one word of a phrase? True where it keeps no vocabulary."""
    if not pipe.words or not phrase:
        return True
    return any(word in pipe.words for word in words_of(phrase))
