"""How fast other libraries sample masked tokens, compared with ours at equal width and depth.

    pip install muse-maskgit-pytorch diffusers transformers
    python -m experiments.peers                     # results/peers.md; 6 minutes of one thread

All have random weights and sample 4 images of 256 tokens with guidance, which takes two forward
passes per step. The times exclude T, E and D. Each library's own sampling loop is used, with its
default settings. If a library is not installed, its row says so.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from checkpoint.files import check_place, write_text
from commandline.options import Parser, filled, whole
from commandline.terminal import run_command, say
from experiments.common import RESULTS, heading, table
from experiments.speed import TYPES, median_seconds, ms
from muse import Muse, MuseConfig, decode
from pretrain.common import machine
from styledrop import guided_logits

WIDTH = 256
LAYERS = 6
HEADS = 8
STATES = 48                             # of the text, all of width WIDTH: random, the same for all


def ours(patch):
    """Our G -> the model and a function that samples 4 images in some steps."""
    config = MuseConfig(grid=16, codebook_size=1024, width=WIDTH, layers=LAYERS, heads=HEADS,
                        patch=patch, token_width=WIDTH // patch, text_width=WIDTH, text_layers=0)
    G = Muse(config).requires_grad_(False)
    text = torch.randn(8, STATES, WIDTH)
    mask = torch.ones(8, STATES, dtype=torch.bool)

    def logits_fn(v, step):
        base = G(v, text[:4], mask[:4])
        null = G(v, text[4:], mask[4:])
        return guided_logits(base, base, null, 0, 3)

    def sample(steps):
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        decode(logits_fn, 4, config.tokens, config.mask_id, steps, 1.0, generators)

    return G, sample


def muse_maskgit():
    """MaskGit of muse-maskgit-pytorch (lucidrains), whose text encoder is replaced by noise."""
    from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, VQGanVAE, t5
    from transformers import T5Config
    t5.T5_CONFIGS["random"] = dict(config=T5Config(d_model=WIDTH))
    G = MaskGitTransformer(num_tokens=1024, seq_len=256, dim=WIDTH, depth=LAYERS,
                           dim_head=WIDTH // HEADS, heads=HEADS, t5_name="random")
    G.encode_text = lambda texts: torch.randn(len(texts), STATES, WIDTH)
    model = MaskGit(image_size=256, transformer=G, vae=VQGanVAE(dim=32, codebook_size=1024))
    del model.vae                                            # only tokens are sampled, as elsewhere
    model.vae = SimpleNamespace(get_encoded_fmap_size=lambda side: 16,
                                decode_from_ids=lambda ids: ids)

    def sample(steps):
        model.generate(["a cat"] * 4, timesteps=steps)

    return G, sample


def amused():
    """AmusedPipeline of diffusers, whose model also has convolutions."""
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel
    G = UVit2DModel(hidden_size=WIDTH, cond_embed_dim=WIDTH, micro_cond_encode_dim=64,
                    micro_cond_embed_dim=320, encoder_hidden_size=WIDTH, vocab_size=1025,
                    codebook_size=1024, in_channels=WIDTH, block_out_channels=WIDTH,
                    num_res_blocks=1, block_num_heads=HEADS, num_hidden_layers=LAYERS,
                    num_attention_heads=HEADS, intermediate_size=4 * WIDTH, sample_size=16)
    pipe = AmusedPipeline(None, None, None, G, AmusedScheduler(mask_token_id=1024))
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(2, 4, STATES, WIDTH)
    words = torch.randn(2, 4, WIDTH)

    def sample(steps):
        pipe(prompt_embeds=words[0], encoder_hidden_states=text[0],
             negative_prompt_embeds=words[1], negative_encoder_hidden_states=text[1],
             num_inference_steps=steps, height=128, width=128, output_type="latent")

    return G, sample


PEERS = {"ours, patch 1 (as Muse)": partial(ours, patch=1),
         "ours, patch 2 (as shipped)": partial(ours, patch=2),
         "muse-maskgit-pytorch": muse_maskgit, "aMUSEd (diffusers)": amused}


def measure(make, steps, repeats):
    """A row: parameters, and the time of a forward pass in fp32 and in bf16."""
    torch.manual_seed(0)
    try:
        G, sample = make()
    except ImportError as error:
        return [f"not installed ({error})", *["-"] * len(TYPES)]
    row = [f"{sum(p.numel() for p in G.parameters()) / 1e6:.1f} M"]
    for name in TYPES:
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                seconds = median_seconds(lambda: sample(steps), repeats)
            row.append(ms(seconds / (2 * steps)))
        except RuntimeError:                                 # it was not written for autocast
            row.append("fails")
    return row


def options():
    """The command's options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--steps", type=whole(1, 1000), default=18, help="of decoding (default: %(default)s)")
    add("--repeats", type=whole(1, 1000), default=5,
        help="runs that a time is the median of (default: %(default)s)")
    add("--out", type=filled, default=str(RESULTS), help="folder of the results")
    return parser


def main():
    args = options().parse_args()
    check_place(args.out)
    rows = []
    for name, make in PEERS.items():
        rows.append([name, *measure(make, args.steps, args.repeats)])
        say("  ".join(rows[-1]))
    text = "\n".join([
        *heading("Other libraries"),
        f"{machine('cpu')}. Random weights: width {WIDTH}, {LAYERS} layers, {HEADS} heads, 256 "
        f"tokens of 1,024, {STATES} states of text. The time is that of a forward pass: a sampling "
        f"loop of {args.steps} steps on 4 images, divided by its {2 * args.steps} passes; median "
        f"of {args.repeats}. The numbers of parameters differ.", "",
        *table(["", "parameters", *TYPES], rows)])
    write_text(Path(args.out) / "peers.md", text)
    say(text)


if __name__ == "__main__":
    run_command(main)
