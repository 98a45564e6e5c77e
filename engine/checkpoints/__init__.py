"""Reads and writes weights, in our format and in those of other projects.

run.py              checkpoints of a run: written aside, hashed, renamed; exact resume; saver.py: in the background;
                    lock.py: one process per folder
weights.py          finds the weights file of a path, the same for loading, hashing and reading
load.py             any checkpoint -> encoder, model or classifier; frozen.py: an encoder for features
untrained.py        `random` as a checkpoint
classifiers.py      fine-tuned classifiers and their class names
foreign.py          VideoMAE, VideoMAE v2 and Hugging Face files -> our names (names.py); foreign_models.py: -> models
export.py           our weights -> their formats; traced.py: torch.export and ONNX
weight_files.py     recognizes and checks weights files; pickles.py: unpickles tensors without executing code
"""
