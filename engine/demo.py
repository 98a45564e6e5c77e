"""The demo: synthetic clips → pre-training → measurements on unseen clips → a report page."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine.checkpoints import checkpoint
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.config.recipe import load_recipe
from mam2.engine.config.training import RunConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import Manifest, read_manifest
from mam2.engine.data.synthetic import write_dataset
from mam2.engine.evaluation.features import clip_features
from mam2.engine.evaluation.linear_probe import bootstrap, linear_probe
from mam2.engine.evaluation.pools import Pool
from mam2.engine.evaluation.pretext import PretextResult, measure_pretext, reconstruct
from mam2.engine.evaluation.report import draw_strips, write_report
from mam2.engine.files import make_folder, write_whole, writing
from mam2.engine.model.encoder import Encoder
from mam2.engine.model.mam2 import MAM2
from mam2.engine.runtime.device import pick_device
from mam2.engine.runtime.progress import Progress
from mam2.engine.tokenizer.files import load_vqgan
from mam2.engine.tokenizer.prepare import FILE as TOKENIZER_FILE
from mam2.engine.tokenizer.prepare import build_tokenizer
from mam2.engine.train.loop import TrainResult
from mam2.engine.train.pretrain import pretrain

TRAIN_CLIPS, TEST_CLIPS = 2400, 800
SHOWN = ("clockwise", "down", "grow", "left")
"""Motions in the report's pictures."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The demo's measurements on test clips; accuracies from 0 to 1."""

    pretext: PretextResult
    probe_pretrained: float
    probe_pretrained_interval: tuple[float, float]
    probe_random: float
    probe_random_interval: tuple[float, float]
    probe_gain_interval: tuple[float, float]
    """95 % paired bootstrap interval of the difference."""

    def verdicts(self) -> dict[str, bool]:
        """Returns the demo's claims, and whether each holds."""
        return {
            "probe: pre-trained beats random by 10 points": self.probe_pretrained - self.probe_random >= 0.10,
            "codes: at least twice the most frequent code": self.pretext.code_accuracy
            >= 2 * self.pretext.commonest_code,
            "motion: better than predicting none, whole interval": self.pretext.motion_interval[1] < 1,
        }


def demo(
    out: Path, *, train_clips: int = TRAIN_CLIPS, test_clips: int = TEST_CLIPS, config: PretrainConfig | None = None
) -> tuple[TrainResult, DemoResult | None]:
    """Runs the whole demo in `out` (clips, run, report). Returns None if a signal ended pre-training."""
    start = time.perf_counter()
    config = decoding_for(config or load_recipe("demo"))
    data, run = out / "clips", out / "run"
    with writing(out):
        return _demo(out, data, run, train_clips, test_clips, config, start)


def _demo(
    out: Path, data: Path, run: Path, train_clips: int, test_clips: int, config: PretrainConfig, start: float
) -> tuple[TrainResult, DemoResult | None]:
    make_folder(out)
    write_dataset(data, train=train_clips, test=test_clips)
    trained = pretrain(config, data / "train", run, resume=run.is_dir())
    if trained.signal:
        return trained, None
    # Uses the run's config: an earlier call may have left a finished run here.
    result, strips = _measure(config, data, run)
    rows = _rows(result)
    write_whole(run / "demo.json", json.dumps(asdict(result) | {"verdicts": result.verdicts()}, indent=1))
    page = write_report(
        run,
        title="MAM2 demo",
        rows=rows,
        verdicts=result.verdicts(),
        strips=strips,
        config=json.loads((run / "config.json").read_text(encoding="utf-8")),
        notes=f"Pre-trained for {trained.step} steps on {trained.used} synthetic clips whose class is their motion; "
        f"measured on {test_clips} unseen clips.",
    )
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    for claim, holds in result.verdicts().items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    print(f"report: {page} ({time.perf_counter() - start:.0f} s in all)")
    return trained, result


def decoding_for(config: PretrainConfig) -> PretrainConfig:
    """Returns the data config with PyAV on all cores on a GPU: half of the clips are too small for NVDEC."""
    if pick_device(config.run).type != "cuda":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, decoder="pyav", threads=0))


def _measure(config: PretrainConfig, data: Path, run: Path) -> tuple[DemoResult, bytes]:
    device = pick_device(config.run)
    vqgan = load_vqgan(run / TOKENIZER_FILE)
    tokenizer = build_tokenizer(vqgan, config, device)
    codes = vqgan.config.codes
    torch.manual_seed(config.run.seed)
    # not build_model: measure_pretext needs MAM2, which every demo recipe is
    random, pretrained = (MAM2(config, codes).to(device).eval() for _ in range(2))
    folder = checkpoint.newest(run)
    assert folder is not None
    checkpoint.load_weights(pretrained, folder / checkpoint.WEIGHTS)

    manifests = {split: read_manifest(data / split) for split in ("train", "test")}
    loaders = {
        split: ClipLoader(manifest, config.data, batch=64, device=device, seed=config.run.seed, train=False)
        for split, manifest in manifests.items()
    }
    try:
        encoders = [random.encoder, pretrained.encoder]
        (train_random, train_pretrained), train_labels = _features(encoders, loaders["train"])
        (test_random, test_pretrained), test_labels = _features(encoders, loaders["test"])
        pretext = measure_pretext(pretrained, tokenizer, loaders["test"], config)
        clips = _one_of_each(manifests["test"], loaders["test"])
    finally:
        for loader in loaders.values():
            loader.close()
    ours = linear_probe(train_pretrained, train_labels, test_pretrained, test_labels)
    theirs = linear_probe(train_random, train_labels, test_random, test_labels)
    strips = reconstruct(pretrained, tokenizer, clips.to(device), config)
    return (
        DemoResult(
            pretext=pretext,
            probe_pretrained=ours.accuracy,
            probe_pretrained_interval=ours.interval,
            probe_random=theirs.accuracy,
            probe_random_interval=theirs.interval,
            probe_gain_interval=bootstrap(ours.right.double() - theirs.right.double()),
        ),
        draw_strips(strips, SHOWN),
    )


def _features(encoders: Sequence[Encoder], loader: ClipLoader) -> tuple[list[Tensor], Tensor]:
    """Computes features of every video for several encoders in evaluation mode with one decoding.

    Returns one float32 [videos, D] per encoder, on the CPU, and the labels int64 [videos].
    """
    run = RunConfig(precision="float32")
    last: list[tuple[int, Pool]] = [(len(encoder.blocks), "mean") for encoder in encoders]
    features: list[list[Tensor]] = [[] for _ in encoders]
    labels = []
    for batch in Progress(loader.evaluate(), "features", loader.evaluated_batches, unit="batch"):
        for encoder, wanted, found in zip(encoders, last, features, strict=True):
            found.append(clip_features(encoder, batch.video, [wanted], run=run)[wanted])
        labels.append(batch.label)
    return [torch.cat(found) for found in features], torch.cat(labels)


def _one_of_each(manifest: Manifest, loader: ClipLoader) -> Tensor:
    """Returns the first test clip of each motion in `SHOWN`: uint8 [B, T, H, W, C]."""
    found: dict[int, Tensor] = {}
    for batch in loader.evaluate():
        for clip, label in zip(batch.clip, batch.label.tolist(), strict=True):
            found.setdefault(label, clip.clone())
        if len(found) == len(manifest.classes):
            break
    return torch.stack([found[manifest.classes.index(motion)] for motion in SHOWN])


def _rows(result: DemoResult) -> list[tuple[str, str]]:
    def share(value: float, interval: tuple[float, float]) -> str:
        return f"{100 * value:.1f} % (95 %: {100 * interval[0]:.1f} to {100 * interval[1]:.1f})"

    pretext = result.pretext
    gain = result.probe_pretrained - result.probe_random
    return [
        ("linear probe, pre-trained encoder", share(result.probe_pretrained, result.probe_pretrained_interval)),
        ("linear probe, random encoder", share(result.probe_random, result.probe_random_interval)),
        ("gain", share(gain, result.probe_gain_interval).replace("%", "points", 1)),
        ("masked codes predicted correctly", share(pretext.code_accuracy, pretext.code_interval)),
        ("always the most frequent code", f"{100 * pretext.commonest_code:.1f} %"),
        ("motion error / error of predicting no motion", share(pretext.relative_motion, pretext.motion_interval)),
    ]
