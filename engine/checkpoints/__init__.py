"""Weights in and out of files, ours and those of other projects.

run.py              checkpoints of a run: written aside, hashed, renamed; exact resume; lock.py: one process per folder
weights.py          which weights file a path stands for: the one answer for loading, hashing and reading
load.py             any checkpoint -> encoder, model or classifier; frozen.py: an encoder for features
untrained.py        `random` as a checkpoint
classifiers.py      fine-tuned classifiers and their class names
foreign.py          VideoMAE, VideoMAE v2 and Hugging Face files -> our names (names.py)
export.py           our weights -> their formats; traced.py: torch.export and ONNX
weight_files.py     safetensors and pickles with true reasons; pickles.py: unpickles tensors, executes nothing
"""
