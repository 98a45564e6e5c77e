"""`mam2 embed`: a feature for each video of a folder, for search or clustering."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Literal

import tyro

from mam2.engine.config.limits import BATCH, COUNT, COUNT_OR_NONE, check_flags
from mam2.engine.config.pretrain import RunConfig
from mam2.engine.errors import UserError
from mam2.engine.files import check_apart, check_folder, one_line, whole_file, write_whole, writing


def run(arguments: list[str]) -> int:
    def embed(
        checkpoint: tyro.conf.Positional[Path],
        data: Path,
        out: Path,
        layer: int = 0,
        recipe: str = "",
        pool: Literal["mean", "time", "time-center", "time-space"] = "mean",
        stride: int = 0,
        frames: int | None = None,
        size: int | None = None,
        heads: int | None = None,
        batch: int = 32,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        precision: Literal["auto", "bfloat16", "float32"] = "auto",
    ) -> int:
        """Write a feature of the middle clip of every video: its mean token, or a mean for each slot of time.

        Args:
            checkpoint: a run folder, a checkpoint, or weights of VideoMAE or Hugging Face; `random` is an encoder with
                random weights, the model of --recipe.
            data: folder of videos, an annotation list, or a video.
            out: features.npy (float32 [videos, D]; features.json beside it says which row is which video, which file
                of weights was read and the SHA-256 of the encoder in it) or features.parquet (a row per video; needs
                pyarrow).
            layer: block of the encoder whose tokens are averaged, from 1; 0 is the last.
            recipe: of pre-training: model and clips of the checkpoint `random`.
            pool: mean: over all tokens, D values. time: over the tokens of each time slot, slots × D values one after
                the other. time-center, time-space: see mam2 probe.
            stride: distance of two sampled frames instead of the checkpoint's.
            frames: frames of the clips of a checkpoint that does not say them; of others, clips of so many frames.
            size: height and width of these clips, pixels.
            heads: attention heads, of a checkpoint of VideoMAE's code of a width that it never published.
            batch: clips that go through the encoder at once.
            device: `auto` takes a GPU if there is one.
            precision: auto is bfloat16 autocast on a GPU and on x86 CPUs that multiply it, else float32.
        """
        check_flags(
            layer=(layer, COUNT_OR_NONE),
            stride=(stride, COUNT_OR_NONE),
            frames=(frames, COUNT),
            size=(size, COUNT),
            heads=(heads, COUNT),
            batch=(batch, BATCH),
        )
        if out.suffix not in (".npy", ".parquet"):
            raise UserError(f"--out {out}: expected a name that ends in .npy or .parquet")
        if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"--out {out}: parquet needs pyarrow (pip install pyarrow); .npy does not")
        check_apart(data, out)
        with writing(out):
            check_folder(out.absolute().parent)

        import numpy as np

        from mam2.engine.checkpoints.untrained import load_all_frozen
        from mam2.engine.data.manifest import read_manifest
        from mam2.engine.evaluation.feature_files import FeatureSpec, write_features
        from mam2.engine.runtime.device import matmul_dtype, pick_device

        settings = RunConfig(device=device, precision=precision)
        where = pick_device(settings)
        (frozen,) = load_all_frozen(
            [checkpoint], where, recipe=recipe, stride=stride, frames=frames, size=size, heads=heads
        )
        if not 0 <= layer <= frozen.depth:
            raise UserError(f"--layer {layer}: {checkpoint} has the layers 1 to {frozen.depth}; 0 is the last")
        manifest = read_manifest(data)
        with writing(out), tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as folder:
            rows = Path(folder) / "rows.npy"
            wanted = {FeatureSpec(frozen, layer or frozen.depth, pool): rows}
            skipped = write_features(manifest, wanted, batch=batch, run=settings)
            features = np.load(rows)
        there = ~np.isnan(features[:, 0])
        features = features[there]
        videos = [video for video, whole in zip(manifest.videos, there, strict=True) if whole]
        skipped |= {video.path: video.reason for video in manifest.skipped}
        about = {
            "checkpoint": str(checkpoint),
            "weights": str(frozen.weights),
            "sha256": frozen.digest,
            "layer": layer or frozen.depth,
            "pool": pool,
            "shape": [features.shape[1] // frozen.encoder.width, frozen.encoder.width],
            "precision": str(matmul_dtype(settings, where)).removeprefix("torch."),
            "skipped": skipped,
            "classes": manifest.classes,
        }
        paths, labels = [video.path for video in videos], [video.label for video in videos]
        if out.suffix == ".npy":
            index = about | {"paths": paths, "labels": labels}
            with writing(out):
                with whole_file(out) as file:
                    np.save(file, features)
                # ASCII escapes carry every path, also one that is not UTF-8
                write_whole(out.with_suffix(".json"), json.dumps(index, indent=1) + "\n")
        else:
            import pyarrow
            import pyarrow.parquet

            flat = pyarrow.array(features.ravel())
            names = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in paths]
            columns = {
                "path": pyarrow.array(names),
                "label": pyarrow.array(labels),
                "feature": pyarrow.FixedSizeListArray.from_arrays(flat, features.shape[1]),
            }
            table = pyarrow.table(columns).replace_schema_metadata({"mam2": json.dumps(about)})
            with writing(out), whole_file(out) as file:
                pyarrow.parquet.write_table(table, file)
        left_out = f"; {len(skipped)} left out" if skipped else ""
        print(f"{len(videos)} videos, {features.shape[1]} values each: {out}{left_out}")
        for path, reason in skipped.items():
            print(one_line(f"left out  {path}: {reason}"))
        return 0

    return tyro.cli(embed, args=arguments, prog="mam2 embed")
