"""VQGAN codes of clips: the appearance target.

vqgan.py        the network; files.py: reads taming-transformers' checkpoints and writes safetensors
tokenizer.py    a clip -> one codebook index per token (or per token and frame)
training.py     trains a small one; prepare.py: the tokenizer of a run, loaded or trained; quality.py: measures one
from_videos.py `mam2 train-tokenizer`: trains one on videos and measures it on others
cache.py        codes on disk; precompute.py: `mam2 tokenize` fills it
source.py       where a step gets its codes: computed beside it, or read from the cache
"""
