"""Checkpoints of a run: a folder of safetensors and JSON that is either complete or absent.

    RUN/checkpoints/step-00001000/model.safetensors       weights; the config as JSON in the metadata
                                  optimizer.safetensors   the optimizer's state, `<parameter>.<name>`;
                                                          `rng.<device>`; `extra.<name>`
                                  state.json              step, config, versions, SHA-256 of the other two files
                    latest                                name of the newest folder
        best/                                             model.safetensors and state.json of the best validated step

Schedule, clips and masks are functions of the step, so that the step is enough to resume them. A checkpoint is written
to a temporary folder, synced to disk and renamed; only then `latest` is replaced and old checkpoints are removed.
Reading a checkpoint executes no code (no pickle). Tensors that FSDP2 shards over processes are gathered, so that any
number of processes can read them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mam2.engine.checkpoints.weight_files import sort_metadata
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import from_dict, to_dict
from mam2.engine.config.training import TrainConfig
from mam2.engine.errors import UserError
from mam2.engine.files import remove_folder, write_whole, written_aside

FOLDER = "checkpoints"
NAME = re.compile(r"step-\d{8,}")
"""Name of a checkpoint in this folder."""
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
LATEST = "latest"
RNG = "rng."
EXTRA = "extra."
BEST = "best"

Config = TypeVar("Config")


def write(
    run: Path,
    step: int,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    config: TrainConfig,
    metadata: dict[str, str],
    kept_step: int = 0,
) -> Path:
    """Writes a checkpoint's tensors; removes old checkpoints that `run.keep` and `run.keep_every` do not keep.

    kept_step: step of another checkpoint that is never removed; 0: none.
    Raises OSError (disk full, no permission); the older checkpoints are then kept.
    """
    final = folder_of(run, step)
    if not final.is_dir():  # else the step has been saved before, and steps are deterministic
        _write_new(final, step, weights, moments, config, metadata)
    write_whole(final.with_name(LATEST), final.name + "\n")
    every = config.run.keep_every
    for old in _all(run)[: -config.run.keep]:
        number = _step_of(old)
        if number != kept_step and (not every or number % every):
            remove_folder(old)
    return final


def _write_new(
    final: Path,
    step: int,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    config: TrainConfig,
    metadata: dict[str, str],
) -> None:
    state = {"step": step, "config": to_dict(config), "torch": torch.__version__, "code": code_version()}
    metadata = {"config": json.dumps(to_dict(config)), "step": str(step)} | metadata
    with _written_aside(final, state, weights, moments) as aside:
        save_file(weights, aside / WEIGHTS, metadata=metadata)
        sort_metadata(aside / WEIGHTS)
        save_file(moments, aside / OPTIMIZER)


def write_best(
    run: Path,
    step: int,
    weights: dict[str, Tensor],
    config: TrainConfig,
    metadata: dict[str, str],
    found: dict[str, float],
) -> Path:
    """Replaces RUN/best by the weights after `step` steps; `found` are their measured results. Raises OSError."""
    final = run / BEST
    metadata = {"config": json.dumps(to_dict(config)), "step": str(step)} | metadata
    with _written_aside(final, {"step": step, **found}, weights) as aside:
        save_file(weights, aside / WEIGHTS, metadata=metadata)
        sort_metadata(aside / WEIGHTS)
    return final


def remove_best(run: Path) -> None:
    """Removes RUN/best, for a run that starts from the beginning."""
    shutil.rmtree(run / BEST, ignore_errors=True)


@contextmanager
def _written_aside(final: Path, state: dict[str, Any], *tensors: dict[str, Tensor]) -> Iterator[Path]:
    """Yields a temporary folder for files; then adds `state` with their hashes, syncs all and renames it to `final`.

    If anything fails, the temporary folder is removed. Raises OSError, also if the tensors do not fit on the disk.
    """
    try:
        with written_aside(final, durable=True, replace_folder=True) as aside:
            aside.mkdir(parents=True)
            needed = sum(tensor.nbytes for part in tensors for tensor in part.values())
            if shutil.disk_usage(aside).free < needed:
                raise OSError(
                    errno.ENOSPC, f"{needed / 2**20:.0f} MiB do not fit: {os.strerror(errno.ENOSPC)}", str(final.parent)
                )
            yield aside
            hashes = {file.name: _hash(file) for file in sorted(aside.iterdir())}
            (aside / STATE).write_text(json.dumps(state | {"sha256": hashes}, indent=1), encoding="utf-8")
            for file in aside.iterdir():
                file.chmod((aside / STATE).stat().st_mode)  # other users cannot read safetensors' files by default
    except SafetensorError as error:  # the library's exception for an error of the operating system
        raise OSError(errno.EIO, str(error), str(final)) from error


@functools.cache
def code_version() -> str:
    """Returns the package's version and a digest of its sources, to identify the code that wrote a checkpoint."""
    digest = hashlib.sha256()
    for package in ("engine", "kernels"):
        root = Path(__file__).resolve().parents[2] / package
        for file in sorted(root.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    try:
        version = importlib.metadata.version("mam2")
    except importlib.metadata.PackageNotFoundError:  # on PYTHONPATH, but not installed
        version = "uninstalled"
    return f"{version} {digest.hexdigest()[:12]}"


def newest_whole(run: Path, info: Callable[[str], None]) -> Path | None:
    """Returns the newest undamaged checkpoint, or None in a folder without checkpoints.

    Newer ones, which are damaged, are reported and renamed. Raises UserError if all are damaged, and renames none then:
    a new run would replace what is left of them.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(_all(run)):
        if not (damage := why_damaged(folder)):
            break
        damaged.append((folder, damage))
    else:
        if damaged:
            raise UserError(
                f"{run / FOLDER}: every checkpoint is damaged (the newest, {damaged[0][0].name}: {damaged[0][1]}); "
                "restore one from a copy, or start a new run in another folder with --out"
            )
        return None
    for broken, damage in damaged:
        aside = broken.with_name(f"damaged-{broken.name}")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            broken.rename(aside)
        except OSError as error:
            raise UserError(
                f"checkpoint {broken} is damaged ({damage}) and cannot be renamed ({error.strerror}): remove it to use "
                "the previous one"
            ) from None
        info(f"resume  checkpoint {broken} is damaged ({damage}); renamed it to {aside.name}, using the previous one")
    return folder


def why_damaged(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None."""
    try:
        hashes = read_state(folder).get("sha256", {})
    except UserError as error:
        return str(error)
    for name in (WEIGHTS, OPTIMIZER):
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            changed = name in hashes and _hash(folder / name) != hashes[name]
        except OSError as error:  # a bad sector
            return f"{name} cannot be read: {error.strerror}"
        if changed:
            return f"SHA-256 mismatch: {name} changed after it was written"
    return None


def folder_of(run: Path, step: int) -> Path:
    """Returns the path of the checkpoint after `step` steps, whether it exists or not."""
    return run / FOLDER / f"step-{step:08d}"


def newest(run: Path) -> Path | None:
    """Returns the folder of the newest checkpoint of a run, or None."""
    found = _all(run)
    return found[-1] if found else None


def _all(run: Path) -> list[Path]:
    """Returns the checkpoints in the order of their steps; a folder of another name, such as a user's copy, is none."""
    found = (run / FOLDER).glob("step-*")
    return sorted((path for path in found if NAME.fullmatch(path.name) and path.is_dir()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Tensor] | None = None
) -> int:
    """Loads a checkpoint into model, optimizer, random generators and the tensors of `extra`. Returns its step.

    Raises UserError if it does not fit the model.
    """
    state = read_state(folder)
    load_weights(model, folder / WEIGHTS)
    parameters = dict(model.named_parameters())
    for key, tensor in load_tensors(folder / OPTIMIZER).items():
        if key.startswith(RNG):
            _set_rng(key.removeprefix(RNG), tensor)
            continue
        if key.startswith(EXTRA):
            own = (extra or {})[key.removeprefix(EXTRA)]
            own.copy_(_placed_like(own, tensor))
            continue
        name, _, entry = key.rpartition(".")
        set_moment(optimizer, parameters[name], entry, tensor)
    return int(state["step"])


def set_moment(optimizer: torch.optim.Optimizer, parameter: Tensor, entry: str, tensor: Tensor) -> None:
    """Sets an entry of a parameter's optimizer state to a complete tensor, on every rank."""
    placed = _placed_like(parameter, tensor) if tensor.shape == parameter.shape else tensor.to(parameter.device)
    optimizer.state[parameter][entry] = placed


def read_state(folder: Path) -> dict[str, Any]:
    """Reads `state.json` of a checkpoint folder."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("not an object")
        return state
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoint {folder}: state.json cannot be read ({error}); remove the folder to use the previous one"
        ) from None


def load_weights(
    model: nn.Module, path: Path, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights
) -> None:
    """Loads safetensors weights into a model. Raises UserError naming the first tensor that does not fit.

    convert: changes the file's tensors before they are loaded.
    """
    weights, own = convert(load_tensors(path)), model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise UserError(f"checkpoint {path}: lacks {name}; use the config it was written with")
        if name not in own:
            raise UserError(
                f"checkpoint {path}: contains {name}, which this model lacks; use the config it was written with"
            )
        if own[name].shape != weights[name].shape:
            raise UserError(
                f"checkpoint {path}: {name} has shape {list(weights[name].shape)}, the model {list(own[name].shape)}; "
                "use the config it was written with"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_placed_like(tensor, weights[name]))


@overload
def read_config(path: Path) -> PretrainConfig: ...
@overload
def read_config(path: Path, kind: type[Config]) -> Config: ...
def read_config(path: Path, kind: type = PretrainConfig) -> Any:
    """Returns the config stored in a checkpoint (its folder or its weights file), of pre-training or another `kind`."""
    return from_dict(kind, json.loads(read_metadata(path)["config"]), where=f"checkpoint {path}")


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a checkpoint (its folder or its weights file), including `config` and `step`."""
    path = path / WEIGHTS if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error}") from None
    if "config" not in metadata:
        raise UserError(f"checkpoint {path}: contains no config; expected one of mam2 pretrain or mam2 finetune")
    return metadata


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a file of safetensors. Raises UserError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read: {error}") from None


def _placed_like(own: Tensor, whole: Tensor) -> Tensor:
    """Returns a complete tensor on the device of `own`, or this rank's shard of it if `own` is sharded."""
    if isinstance(own, DTensor):
        return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)
    return whole.to(own.device)


def _set_rng(device: str, state: Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    elif torch.cuda.is_available():
        torch.cuda.set_rng_state(state)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
