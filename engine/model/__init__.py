"""The models: MAM2, its VideoMAE baseline, and the VQGAN tokenizer that names appearances."""
