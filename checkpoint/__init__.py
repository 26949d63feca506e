"""Reading and writing files: weights, adapters, run folders, public CLIP weights.

files.py     atomic writing of files
weights.py   reading and writing weights; no code in a file is ever executed
adapters.py  a tuned adapter and its file
clip.py      CLIP weights: ours, OpenAI's and open_clip's
runs.py      run folders: resuming, and refusing to overwrite
"""
