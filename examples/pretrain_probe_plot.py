"""Pre-train, probe, embed and plot from Python: `python examples/pretrain_probe_plot.py [FOLDER] [--quick]`.

Makes clips whose class is their motion, pre-trains a tiny encoder on them and measures it beside a random one on clips
that it has not seen: some minutes on two cores; --quick takes seconds, on clips too few to learn from. FOLDER (default:
runs/example) then holds losses.png and features.png. The parts of `main` can be run as cells of a notebook. Wherever a
run is named, the .pth or the Hugging Face folder of a published VideoMAE can be named too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mam2.engine import embed, index, load_recipe, plan, plot, pretrain, probe
from mam2.engine.data.synthetic import write_dataset


def main(out: Path, *, quick: bool = False) -> dict[str, Any]:
    """Returns what the calls returned."""
    run = out / "run"

    # Clips, half of them mp4, half webm; the class of a clip is the name of its folder
    write_dataset(out / "clips", train=48 if quick else 1200, test=24 if quick else 400)
    videos = index(out / "clips" / "train", out / "train.index.jsonl").manifest
    print(f"{len(videos.videos)} videos of the classes {', '.join(videos.classes)}")

    # A recipe with some values changed; what it will take
    config = load_recipe("demo", optim={"epochs": 5.0})
    if quick:
        config = load_recipe(
            "demo",
            model={"objective": "videomae", "width": 24, "depth": 1, "heads": 2},
            optim={"batch": 16, "epochs": 1.0},
            run={"compile": False},
        )
    print(plan(config).report(videos=len(videos.videos)))

    # Pre-train; a second call continues where the first stopped
    trained = pretrain(config, out / "clips" / "train", run, resume=True)
    print(f"{trained.step} steps, {trained.checkpoint}")
    plot([run], out / "losses.png")

    # Probe: the encoder is frozen, a linear classifier learns the classes from its features
    report = probe(
        ["random", run],
        out / "clips" / "train",
        out / "clips" / "test",
        probes=["linear"],
        pools=["mean"],
        cache=out / "features",
    )
    for score in report.scores:
        low, high = score.interval
        print(f"linear probe of {Path(score.checkpoint).name}: {score.accuracy:.1%} (95 %: {low:.1%} to {high:.1%})")

    # Embed the test clips: a feature per video, here in the two directions in which they differ most
    found = embed(run, out / "clips" / "test", out / "features.npz")
    centered = found.features - found.features.mean(0)
    x, y = (centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T).T
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.subplots()
    for number, motion in enumerate(found.about["classes"]):
        shown = found.labels == number
        axis.scatter(x[shown], y[shown], s=8, label=motion)
    axis.set_title("test clips, two principal components")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(out / "features.png", dpi=120)
    return {"trained": trained, "report": report, "found": found}


if __name__ == "__main__":  # the clips are made by processes that import this file
    names = [argument for argument in sys.argv[1:] if argument != "--quick"]
    main(Path(names[0] if names else "runs/example"), quick="--quick" in sys.argv)
