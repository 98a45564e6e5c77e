"""The config of a run as frozen dataclasses: every field has a default, a docstring and limits.

pretrain.py    PretrainConfig
finetune.py    FinetuneConfig
training.py    the tables and checks that both share: data, optimizer, run, the grid of tokens
recipe.py      reads recipes (TOML, `extends`) and saved configs, key by key
sizes.py       named sizes of the encoder, named presets of regressor and decoders
limits.py      the allowed interval of a number, declared on its field
describe.py    configs as text: what each key means, a recipe as TOML
"""
