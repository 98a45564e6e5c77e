"""VQGAN codes of clips, the appearance target.

vqgan.py        the network; files.py: reads taming-transformers' checkpoints and writes safetensors
tokenizer.py    a clip -> one codebook index per token (or per token and frame); compiled.py: the network compiled,
                on a GPU as CUDA graphs
training.py     trains a small VQGAN, from k-means (kmeans.py); prepare.py: loads or trains a run's tokenizer;
                fidelity.py: what reconstructions explain; quality.py: measures a tokenizer, with pictures
from_videos.py  `mam2 train-tokenizer`: trains a VQ model on videos and measures it on held-out videos
cache.py        codes on disk; cache_files.py: their files; cache_key.py: what they depend on; clip_files.py: recorded
                clips next to them; precompute.py: `mam2 tokenize` writes both
source.py       the source of a step's codes: computed during training, or read from the cache
"""
