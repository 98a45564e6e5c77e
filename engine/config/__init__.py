"""The config of a run as frozen dataclasses: every field has a default, a docstring and limits.

pretrain.py    PretrainConfig, and the tables that all training runs share (data, optimizer, run)
finetune.py    FinetuneConfig
recipe.py      reads recipes (TOML, `extends`) and saved configs, key by key
sizes.py       named sizes of the encoder, named presets of regressor and decoders
limits.py      the allowed interval of a number, declared on its field
"""
