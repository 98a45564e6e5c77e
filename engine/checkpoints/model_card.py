"""Writes a model card (the README.md of a model repository) from the files of a run; nothing in it is typed by hand.

Information that is not in a run's files is omitted; for a checkpoint of another project the card contains only its
sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mam2.engine.checkpoints import checkpoint
from mam2.engine.checkpoints.load import Model, encoder_of
from mam2.engine.checkpoints.weights import find_weights
from mam2.engine.config.recipe import shareable
from mam2.engine.data.manifest import read_saved_manifest
from mam2.engine.errors import UserError
from mam2.engine.files import printable
from mam2.engine.model.classifier import Classifier
from mam2.engine.runtime.log import read_log
from mam2.engine.units import counted

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""A license identifier of the hub: apache-2.0, cc-by-nc-4.0, other."""
LAST_SHOWN = ("loss/", "accuracy/", "validation/")
"""Prefixes of the log's quantities whose last values are shown."""
TRAINING_SHOWN = (
    *(("data", key) for key in ("frames", "stride", "fps", "sampling", "size", "crop", "flip", "views")),
    *(("optim", key) for key in ("name", "batch", "epochs", "warmup_epochs", "base_lr", "weight_decay", "layer_decay")),
    *(("mask", key) for key in ("kind", "ratio")),
    *(("loss", key) for key in ("appearance_target", "motion_target", "pixel_normalize")),
    ("run", "seed"),
)
"""Keys of a config in the table of the recipe."""
TEACHER_SHOWN = tuple(
    ("loss", key) for key in ("visible", "teacher_blocks", "teacher_momentum", "teacher_momentum_end")
)
"""Further keys of a run that predicts the features of a teacher."""
ADAPTERS_SHOWN = (("adapters", "rank"), ("adapters", "alpha"))
"""Further keys of a fine-tuning with low-rank adapters."""


def has_teacher(config: Mapping[str, Any]) -> bool:
    """Returns whether a config, as nested plain values, is of a pre-training with a teacher."""
    objective, loss = config.get("model", {}).get("objective"), config.get("loss", {})
    return objective == "mam2" and loss.get("appearance_target") == "latents"


def has_adapters(config: Mapping[str, Any]) -> bool:
    """Returns whether a config, as nested plain values, is of a fine-tuning with low-rank adapters."""
    return config.get("adapters", {}).get("rank", 0) > 0


def check_license(license: str) -> None:
    """Raises UserError for an invalid license identifier."""
    if not LICENSE.fullmatch(license):
        raise UserError(
            f"--license {license!r}: expected an identifier of the hub, such as apache-2.0, cc-by-nc-4.0 or other"
        )


def run_folder(path: str | Path) -> Path | None:
    """Returns the run folder of a MAM2 checkpoint; None for any other."""
    weights = find_weights(path)
    if weights is None:
        return None
    return next((folder for folder in list(weights.absolute().parents)[:3] if (folder / "log.jsonl").is_file()), None)


def model_card(
    path: str | Path, model: Model, *, name: str, license: str, to: str, classes: Sequence[str], scores: Sequence[Path]
) -> str:
    """Returns the card of a checkpoint as Markdown.

    Args:
        path: the checkpoint.
        model: the model of the checkpoint.
        name: name of the repository or folder.
        license: license identifier of the hub.
        to: `huggingface` or `mam2`, the format of the weights.
        classes: class names of a classifier.
        scores: result files of `mam2 probe` and `mam2 evaluate`, in addition to those in the run folder.

    Raises UserError if a file of scores cannot be read.
    """
    weights, run = find_weights(path), run_folder(path)
    metadata = checkpoint.read_metadata(weights) if weights else {}
    config = shareable(json.loads(metadata["config"])) if metadata else {}
    parts = [
        _front_matter(license, to, model),
        f"# {name}\n",
        _summary(model, config, metadata),
        _usage(name, to, model),
        _classes(classes),
        _data(run, config),
        _recipe(config, metadata),
        _hardware(run),
        _scores(run, scores),
        "This card was written by `mam2 export` from the files of the run.\n",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(license: str, to: str, model: Model) -> str:
    library = "transformers" if to == "huggingface" else "mam2"
    task = "video-classification" if isinstance(model, Classifier) else "feature-extraction"
    return (
        f"---\nlicense: {license}\nlibrary_name: {library}\npipeline_tag: {task}\ntags: [video, mam2, videomae]\n---\n"
    )


def _summary(model: Model, config: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    encoder = encoder_of(model)
    (slots, rows, columns), (tubelet, height, width) = encoder.grid, encoder.patch_size
    heads = getattr(getattr(encoder.blocks[0], "attn", None), "heads", 0)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    clip = f"{slots * tubelet} frames of {rows * height}×{columns * width} pixels"
    kind = "A video classifier" if isinstance(model, Classifier) else "A video encoder"
    objective = config.get("model", {}).get("objective")
    how = f", pre-trained with the objective `{objective}` of MAM2's engine" if objective else ""
    lines = [
        f"{kind}{how}: a ViT of {len(encoder.blocks)} blocks, width {encoder.width}, {heads} heads, patches of "
        f"{tubelet}×{height}×{width}, {parameters / 1e6:.1f} M parameters in the encoder. It takes clips of {clip}.",
    ]
    if "step" in metadata:
        lines.append(f"\nThe weights are those after step {metadata['step']}.")
    if has_teacher(config):
        lines.append("The weights are those of the trained encoder, not of its teacher (a moving average).")
    if has_adapters(config):
        lines.append(
            f"Fine-tuning trained low-rank adapters (LoRA, rank {config['adapters']['rank']}) and the head; the loaded "
            "model is a plain one, with the adapters merged into its weights."
        )
    if "start" in metadata:
        began = json.loads(metadata["start"])
        lines.append(f"Training started from the weights of `{printable(Path(began['checkpoint']).name)}`.")
    return "\n".join(lines) + "\n"


def _usage(name: str, to: str, model: Model) -> str:
    load = "load_model" if isinstance(model, Classifier) else "load_encoder"
    call = "model.scores(model(video))  # [B, outputs]" if load == "load_model" else "model.encode(video)  # [B, N, D]"
    if isinstance(model, Classifier) and model.task == "classes":
        call = "model(video).softmax(-1)  # [B, classes]"
    code = f'from mam2.engine import {load}\n\nmodel = {load}("hub:{name}")\n'
    code += f"output = {call}; video [B, {encoder_of(model).channels}, T, H, W] uint8\n"
    if to == "huggingface":
        kind = "VideoMAEForVideoClassification" if isinstance(model, Classifier) else "VideoMAEModel"
        code += f'\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}")\n'
    return f"## Use\n\n```python\n{code}```\n"


def _classes(classes: Sequence[str]) -> str:
    named = ", ".join(f"{number} {printable(name)}" for number, name in enumerate(classes))
    return f"## Classes\n\n{named}\n" if classes else ""


def _data(run: Path | None, config: Mapping[str, Any]) -> str:
    path = run / "manifest.jsonl" if run else None
    if path is None or not path.is_file():
        return ""
    manifest = read_saved_manifest(path)
    known = [video.duration_s for video in manifest.videos if video.duration_s]
    sides = sorted(min(video.shown_size) for video in manifest.videos)
    rows = [("videos", f"{len(manifest.videos):,}"), ("unusable files", f"{len(manifest.skipped):,}")]
    if manifest.classes:
        rows.append(("classes", f"{len(manifest.classes):,}"))
    if known:
        rows.append(("hours of video", f"{sum(known) / 3600:.2f}"))
    if sides:
        rows.append(("shorter side, median", f"{sides[len(sides) // 2]} pixels"))
    weights = config.get("data", {}).get("weights") or [each.videos for each in manifest.sets]
    for each, weight in zip(manifest.sets, weights, strict=False):
        videos, files = counted(each.videos, "video", ","), counted(each.skipped, "unusable file", ",")
        counts = f"{videos}, {files}, {weight / sum(weights):.1%} of the clips"
        rows.append((f"data set `{printable(Path(each.source).name)}`", counts))
    return f"## Training data\n\n{_table(('', ''), rows)}"


def _recipe(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    if not config:
        return ""
    rows = [
        (f"`{table}.{key}`", f"`{config[table][key]}`")
        for table, key in TRAINING_SHOWN + TEACHER_SHOWN * has_teacher(config) + ADAPTERS_SHOWN * has_adapters(config)
        if key in config.get(table, {}) and config[table][key] != ""
    ]
    whole = json.dumps(config, indent=1)
    details = f"<details><summary>The whole config</summary>\n\n```json\n{whole}\n```\n\n</details>\n"
    return f"## Recipe\n\n{_table(('key', 'value'), rows)}\n{details}"


def _hardware(run: Path | None) -> str:
    if run is None:
        return ""
    log = (run / "log.txt").read_text(encoding="utf-8", errors="replace") if (run / "log.txt").is_file() else ""
    machines = list(dict.fromkeys(re.findall(r"run +\S.* on (.+)$", log, re.MULTILINE)))
    lines = read_log(run)
    rates = sorted(line["clips_per_s"] for line in lines if "clips_per_s" in line)
    rows = [("machine", machine) for machine in machines]
    if rates:
        rows.append(("clips per second, median", f"{rates[len(rates) // 2]:.1f}"))
    return f"## Hardware\n\n{_table(('', ''), rows)}" if rows else ""


def _scores(run: Path | None, files: Sequence[Path]) -> str:
    rows: list[tuple[str, str]] = []
    if run is not None:
        last: dict[str, float] = {}
        for line in read_log(run):
            last |= {name: value for name, value in line.items() if name.startswith(LAST_SHOWN)}
        rows += [(f"`{name}`, last logged", f"{value:.4g}") for name, value in sorted(last.items())]
        if (run / checkpoint.BEST).is_dir():
            best = checkpoint.read_state(run / checkpoint.BEST)
            rows += [(f"`{name}`, best", f"{100 * best[name]:.2f} %") for name in sorted(best) if "accuracy" in name]
    inside = sorted(run.glob("*/results.json")) + sorted(run.glob("*probe*.json")) if run else []
    for file in dict.fromkeys([*inside, *files]):
        try:
            rows += _of_file(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if file in files:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"--scores {file}: expected what mam2 probe or evaluate wrote: {reason}") from None
    return f"## Scores\n\n{_table(('', ''), rows)}" if rows else ""


def _of_file(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the rows of results.json of `mam2 evaluate`, or of the JSON file of `mam2 probe`."""
    if "temporal" in values:
        what = f"{counted(values['videos'], 'test video')}, {values['temporal']} × {values['spatial']} views"
    if "mean_average_precision" in values:
        return [(f"mean average precision, {what}", f"{100 * values['mean_average_precision']:.2f} %")]
    if "r2" in values:
        return [(f"mean absolute error, {what}", f"{values['mae']:.4g}"), (f"R², {what}", f"{values['r2']:.4f}")]
    if "top1" in values:
        return [(f"{name}, {what}", f"{100 * values[key]:.2f} %") for key, name in
                (("top1", "top-1"), ("top5", "top-5"), ("mean_class", "mean of the classes"))]  # fmt: skip
    return [
        (
            f"{score['probe']} probe, layer {score['layer']}, {printable(Path(score['checkpoint']).name)}, "
            f"{values['test']} test videos",
            f"{100 * score['accuracy']:.1f} % ({100 * score['interval'][0]:.1f} to {100 * score['interval'][1]:.1f})",
        )
        for score in values["scores"]
    ]


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "".join(f"| {name} | {value} |\n" for name, value in ((a.replace("|", "\\|"), b) for a, b in lines))
