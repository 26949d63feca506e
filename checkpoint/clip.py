"""CLIP weights: those that ship, and the ViTs that OpenAI and open_clip have published."""

import math
from pathlib import Path

from clip_feedback import CLIP, OPENAI_PIXELS, VOCABULARY_FILE, CLIPConfig, Tokenizer

from .weights import TorchScript, build, make_config, read_weights

SIZES = ("input_resolution", "context_length", "vocab_size", "attn_mask")    # are not weights


def load_clip(path, merges=None, quick_gelu=None):
    """A CLIP from a file, in fp32 on the CPU and in eval mode, with its `.tokenizer`.

    path: our own file (a dict of config, weights and merges), or a state dict of OpenAI's or
    open_clip's ViT, bare or under "state_dict". The other two arguments apply only to these ViTs.
    merges: the path of OpenAI's vocabulary file, by default the one in the folder of `path`, if
    there is one. quick_gelu: by default True for OpenAI's own files and False for others. Raises
    FileNotFoundError, or ValueError with a one-line message.
    """
    path = Path(path)
    content = read_clip_file(path)
    try:
        if "weights" in content:
            config = content.get("config")
            weights = content["weights"]
            merges = list(content.get("merges") or ())
        else:
            config, weights = read_public(content, quick_gelu)
            vocabulary = Path(merges or path.parent / VOCABULARY_FILE)
            if merges or vocabulary.exists():
                merges = vocabulary
        config = make_config(CLIPConfig, config)
        tokenizer = Tokenizer(merges) if merges else None
        return build(lambda: CLIP(config, tokenizer), weights)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this CLIP: {error}") from None


def read_clip_file(path):
    """The dict in the file. For a TorchScript archive, ValueError says how to convert it."""
    try:
        return read_weights(path)
    except TorchScript as error:
        new = path.with_name(f"{path.stem}.state_dict.pt")
        raise ValueError(
            f"{error}. If you trust its source, this command converts it, and runs the code in "
            f"it: python -c \"import torch; torch.save(torch.jit.load({str(path)!r}, "
            f"map_location='cpu').state_dict(), {str(new)!r})\"") from None


def read_public(content, quick_gelu=None):
    """A ViT of OpenAI or open_clip -> the fields of CLIPConfig, read off its shapes, and weights.

    Only OpenAI's own files contain sizes too, and all of them were trained with quick_gelu.
    """
    content = content.get("state_dict", content)
    try:
        weights = {}
        for name, weight in content.items():
            if name not in SIZES:
                weights[name.removeprefix("module.").removeprefix("text.")] = weight
        vision_width, _, patch, _ = weights["visual.conv1.weight"].shape
        vocab_size, text_width = weights["token_embedding.weight"].shape
        grid = math.isqrt(len(weights["visual.positional_embedding"]) - 1)
        context_length = len(weights["positional_embedding"])
        embed_dim = weights["text_projection"].shape[1]
    except Exception:                    # other names, other shapes, no tensors
        raise ValueError("it is not a ViT of OpenAI's or open_clip's, the only public CLIPs that "
                         "can be read") from None
    if quick_gelu is None:
        quick_gelu = "input_resolution" in content

    def layers(tower):
        return sum(name.startswith(tower) and name.endswith(".ln_1.weight") for name in weights)

    # heads are 64 wide, except in open_clip's largest image towers (H, g, bigG), which have 16
    # wider ones
    config = dict(resolution=grid * patch, patch=patch, vision_width=vision_width,
                  vision_layers=layers("visual."), vision_heads=min(vision_width // 64, 16),
                  text_width=text_width, text_layers=layers("transformer."),
                  text_heads=text_width // 64, context_length=context_length,
                  vocab_size=vocab_size, embed_dim=embed_dim, quick_gelu=quick_gelu,
                  **OPENAI_PIXELS)
    return config, weights
