"""Reads and writes VQGANs: our safetensors, and Lightning checkpoints published by taming-transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mam2.engine.checkpoints.pickles import load_pickle
from mam2.engine.checkpoints.weight_files import check_whole, kind_of
from mam2.engine.errors import UserError
from mam2.engine.files import write_whole
from mam2.engine.tokenizer.vqgan import VQGAN, VQGANConfig

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "patch_in.", "patch_out.")
"""Parts of a checkpoint that are read; the others (discriminator, perceptual network) are only for training."""
CONFIG_KEY = "vqgan_config"
CONFIGURED_RESOLUTION = 256
"""taming's configs specify attention by resolutions of 256-pixel images."""


class VQGANFileError(UserError, ValueError):
    """Raised for a file that is not a VQGAN; the message names the file, what was expected and what was found."""


def save_vqgan(vqgan: VQGAN, path: str | Path) -> None:
    """Writes safetensors with the config in the metadata, atomically."""
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in vqgan.state_dict().items()}
    # not save_file, whose files other users cannot read
    write_whole(path, save(state, {CONFIG_KEY: json.dumps(dataclasses.asdict(vqgan.config))}))


def fingerprint(vqgan: VQGAN) -> str:
    """Returns the SHA-256 over config and weights (hexadecimal): equal fingerprints mean equal codes."""
    fields = dataclasses.asdict(vqgan.config)
    if not vqgan.config.patch_path:
        del fields["patch_path"]  # a VQGAN without it keeps the fingerprint that caches of codes already name
    if vqgan.config.image_channels == 3:
        del fields["image_channels"]  # likewise
    if vqgan.config.codes_per_patch == 1:
        del fields["codes_per_patch"]  # likewise
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(vqgan.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_vqgan(path: str | Path) -> VQGAN:
    """Loads a VQGAN to the CPU, in evaluation mode, from safetensors (ours, or taming's keys) or taming's `last.ckpt`.

    The config comes from the metadata, or is inferred from the shapes. Every key and shape must match.

    Raises:
        VQGANFileError (a UserError and a ValueError): no such file, another kind of file, a pickle with anything but
            tensors and classes of training frameworks, or parameters that are missing, unexpected or of a wrong shape.
    """
    return read_vqgan(path)[0]


def read_vqgan(path: str | Path) -> tuple[VQGAN, list[str]]:
    """Does the same as `load_vqgan`; also returns the names of the file's training parameters, which it ignores."""
    path = Path(path)
    if not path.is_file():
        raise VQGANFileError(f"{path}: expected a VQGAN checkpoint (.ckpt or .safetensors), found no such file")
    try:
        check_whole(path)
        kind = kind_of(path)
    except UserError as error:
        raise VQGANFileError(str(error)) from None
    safetensors = kind == "safetensors" or (kind == "unknown" and path.suffix == ".safetensors")
    read = _read_safetensors if safetensors else _read_checkpoint
    state, config = read(path)
    left_out = [name for name in state if not name.startswith(PARTS)]
    state = {name: tensor for name, tensor in state.items() if name.startswith(PARTS)}
    config = config or _infer_config(path, state)
    with torch.device("meta"):
        vqgan = VQGAN(config)
    expected = {name: tuple(tensor.shape) for name, tensor in vqgan.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        name = min(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise VQGANFileError(
            f"{path}: expected {name} of shape {expected.get(name, 'none')}, found {found.get(name, 'none')}; "
            "this is not a VQGAN of taming-transformers"
        )
    vqgan.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return vqgan.eval(), left_out


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], VQGANConfig | None]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise VQGANFileError(f"{path}: expected safetensors, found an unreadable file ({error})") from error
    if CONFIG_KEY not in metadata:
        return state, None
    try:
        fields: dict[str, Any] = json.loads(metadata[CONFIG_KEY])
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return state, VQGANConfig(**{**fields, **lists})
    except (TypeError, ValueError) as error:
        raise VQGANFileError(f"{path}: expected a VQGAN config in the metadata, found {error}") from error


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], None]:
    try:
        checkpoint = load_pickle(path)
    except UserError as error:
        raise VQGANFileError(str(error)) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}, None


def _infer_config(path: Path, state: dict[str, Tensor]) -> VQGANConfig:
    """Returns the config with these parameter shapes, and taming's 32 groups."""
    with contextlib.suppress(KeyError, ValueError):
        channels = len(state["encoder.conv_in.weight"])
        levels = 1 + max(_indices(state, "decoder.up."))
        gumbel = "quantize.embed.weight" in state
        return VQGANConfig(
            codes=len(state["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]),
            quantizer="gumbel" if gumbel else "vq",
            embed_dim=len(state["quant_conv.weight"]),
            z_channels=len(state["encoder.conv_out.weight"]),
            channels=channels,
            channel_multipliers=tuple(
                len(state[f"decoder.up.{level}.block.0.conv1.weight"]) // channels for level in range(levels)
            ),
            res_blocks=len(_indices(state, "decoder.up.0.block.")) - 1,
            attention_levels=tuple(level for level in range(levels) if _indices(state, f"decoder.up.{level}.attn.")),
            patch_path="patch_in.weight" in state,
            image_channels=state["encoder.conv_in.weight"].shape[1],
            codes_per_patch=1 + len(_indices(state, "quantize.residual.")),
        )
    raise VQGANFileError(
        f"{path}: expected the parameters of a VQGAN (encoder.conv_in.weight, quantize.embedding.weight, …), "
        f"found {', '.join(sorted(state)[:3]) or 'none of them'}"
    )


def _indices(state: dict[str, Tensor], prefix: str) -> set[int]:
    return {int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)}
