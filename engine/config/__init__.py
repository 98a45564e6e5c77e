"""What a run is, as frozen dataclasses: every field has a default, a docstring and limits.

pretrain.py    PretrainConfig, and what all training runs share (data, optimizer, run)
finetune.py    FinetuneConfig
recipe.py      reads recipes (TOML, `extends`) and saved configs, key by key
sizes.py       named sizes of the encoder, named presets of what follows it
limits.py      the interval that a number must lie in, declared on its field
"""
