"""Training a base: each stage is a command of its own, `python -m pretrain.muse` and so on.

common.py    what the stages share: options, batches, optimisers, the run folder
vqgan.py     the tokenizer: E, D and the codebook
clip.py      CLIP, which judges images
muse.py      the first stage: T and G
superres.py  the second stage
"""
