"""The models: MAM2 (mam2.py), its VideoMAE baseline (videomae.py) and the VQGAN that names appearances (tokenizer.py)."""
