"""Pre-train, probe and plot from Python: `python examples/pretrain_probe_plot.py [FOLDER]`, some minutes on two cores.

The example writes clips whose class is their motion, pre-trains a tiny encoder on them for a quarter of the demo's
epochs, and compares it with a random encoder on unseen clips. It writes losses.png and features.png to FOLDER (default:
runs/example). `load_encoder` also reads the .pth file or the Hugging Face folder of a published VideoMAE.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from mam2.engine import load_encoder, load_recipe, pretrain
from mam2.engine.config.pretrain import PretrainConfig
from mam2.engine.data.loader import ClipLoader
from mam2.engine.data.manifest import read_manifest
from mam2.engine.data.synthetic import write_dataset
from mam2.engine.evaluation.features import extract_features
from mam2.engine.evaluation.linear_probe import linear_probe
from mam2.engine.evaluation.plots import draw_logs
from mam2.engine.model.encoder import Encoder
from mam2.engine.runtime.log import read_log


def main(
    out: Path = Path("runs/example"),
    *,
    train_clips: int = 1200,
    test_clips: int = 400,
    config: PretrainConfig | None = None,
) -> dict[str, float]:
    """Runs the example; returns the accuracies of both encoders, 0 to 1."""
    if config is None:
        config = load_recipe("demo")
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=5.0))
    write_dataset(out / "clips", train=train_clips, test=test_clips)

    pretrain(config, out / "clips" / "train", out / "run", resume=True)
    (out / "losses.png").write_bytes(draw_logs({"run": read_log(out / "run")}))

    torch.manual_seed(0)
    encoders = {"random": Encoder.from_config(config).eval(), "pre-trained": load_encoder(out / "run")}
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels = []
    for split in ("train", "test"):
        manifest = read_manifest(out / "clips" / split)
        with ClipLoader(manifest, config.data, batch=64, device=torch.device("cpu"), seed=0, train=False) as loader:
            found, label = extract_features(list(encoders.values()), loader)
        for name, each in zip(encoders, found, strict=True):
            features[name].append(each)
        labels.append(label)

    accuracies = {}
    for name, (train, test) in features.items():
        result = linear_probe(train, labels[0], test, labels[1])
        accuracies[name] = result.accuracy
        low, high = (100 * value for value in result.interval)
        print(f"linear probe, {name} encoder: {100 * result.accuracy:.1f} % (95 %: {low:.1f} to {high:.1f})")
    plot(features, labels, manifest.classes, out / "features.png")
    return accuracies


def plot(features: dict[str, list[Tensor]], labels: list[Tensor], classes: tuple[str, ...], path: Path) -> None:
    """Plots each encoder's test clips along the two directions in which the training clips' classes differ most.

    features: [clips, D] of the training and the test clips; labels: [clips] of both.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(features), figsize=(5 * len(features), 4.5), layout="constrained")
    for axis, (name, (train, test)) in zip(axes, features.items(), strict=True):
        mean, deviation = train.mean(0), train.std(0) + 1e-6
        centres = torch.stack([train[labels[0] == number].mean(0) for number in range(len(classes))])
        directions = torch.linalg.svd((centres - centres.mean(0)) / deviation, full_matrices=False).Vh[:2]
        x, y = ((test - mean) / deviation @ directions.T).unbind(1)
        for number, motion in enumerate(classes):
            shown = labels[1] == number
            axis.scatter(x[shown], y[shown], s=8, label=motion)
        axis.set_title(f"{name} encoder")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
