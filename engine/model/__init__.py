"""The networks: MAM2, the VideoMAE baseline, and the classifier on the encoder.

encoder.py -> regressor.py -> decoders.py are the parts of mam2.py; videomae.py has one decoder (VideoMAE, MAE-DFER)
blocks.py           transformer blocks; positions.py; attention.py: one function, several implementations
attention_tuning.py measures which implementation is fastest here; attention_packages.py: those of other packages
build.py            the model that a config describes
masking.py          the mask of a step; pixels.py: scale and statistics of pixels
motion_targets.py   the targets of the motion decoder; teacher.py: those of the target `latents`
classifier.py       pooled tokens and a linear head; text_head.py: text embeddings as the head; adapters.py: LoRA
pixel_encoder.py    pixels in place of features, for comparison
"""
