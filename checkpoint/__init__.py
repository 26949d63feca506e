"""Reading and writing files: weights, adapters, run folders, public CLIP weights.

files.py     a file is written whole or not at all
weights.py   weights are read as tensors and never as code, and they either fit or are refused
adapters.py  a tuned adapter and its file
clip.py      CLIP weights: ours, OpenAI's and open_clip's
runs.py      the folder that a training command makes, and what a later command may do with it
"""
