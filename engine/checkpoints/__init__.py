"""Reads and writes weights, in our format and in those of other projects.

checkpoint.py      checkpoints of a run: written aside, hashed, renamed; exact resume
saver.py           saves them in the background, from copies in host memory (host_copies.py)
lock.py            one process per run folder
weights.py         finds the weights file of a path, the same for loading, hashing and reading
weight_files.py    recognizes and checks weights files; pickles.py: unpickles tensors without executing code
load.py            any checkpoint -> encoder, model or classifier; frozen.py: an encoder for features
untrained.py       `random` as a checkpoint; channels.py: encoders for gray clips
classifiers.py     fine-tuned classifiers and their class names
foreign.py         files of VideoMAE, VideoMAE v2 and Hugging Face -> our names (names.py)
foreign_models.py  their weights -> models
exporting.py       `mam2 export`; export.py: our weights -> their formats; traced.py: torch.export and ONNX
hub.py             checkpoints on a model hub; model_card.py: their README.md
"""
