"""Writes features of videos and windows as files for other programs.

.npy          float32 [n, values]; a .json file next to it describes each row
.npz          the arrays features, video, label and for windows start_s, end_s; paths and about as JSON
.safetensors  the same as tensors; paths and about in its metadata
.parquet      one row per feature vector; about in the metadata of its schema
.csv          for windows, next to each of them: one row per feature vector with path, label, start_s, end_s
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mam2.engine.checkpoints.weight_files import open_safetensors
from mam2.engine.errors import UserError
from mam2.engine.files import NAMES, whole_file, write_whole

if TYPE_CHECKING:
    from mam2.engine.evaluation.embedding import Embedding

SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet")
_Contents = tuple[dict[str, Any], list[str], dict[str, Any]]
"""Arrays of a file by their names, the path of each row's video, and the file's description."""
ROWS_AT_ONCE = 65536
"""Rows per group in a parquet file; one group is in memory at a time."""


def check_embedding_file(out: Path) -> None:
    """Raises UserError for a name without a known format, or if a package is missing."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: expected a name that ends in {', '.join(SUFFIXES)}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"--out {out}: parquet needs pyarrow (pip install pyarrow); .npy, .npz do not")


def write_embedding(out: Path, embedding: Embedding) -> None:
    """Writes the file and the files next to it, each atomically. Raises OSError."""
    {".npy": _write_npy, ".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}[
        out.suffix
    ](out, embedding)
    if embedding.start_s is not None:
        write_whole(out.with_suffix(".csv"), _table(embedding))


def is_embedding_file(path: Path) -> bool:
    """Returns whether a file was written by `write_embedding`; safetensors files may also be weights."""
    if not path.is_file() or path.suffix not in SUFFIXES:
        return False
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return "about" in (file.metadata() or {})
    return True


def read_embedding(path: Path) -> Embedding:
    """Reads a file of `write_embedding`. Raises UserError for any other file."""
    from mam2.engine.evaluation.embedding import Embedding

    read = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors, ".parquet": _read_parquet}
    try:
        arrays, paths, about = read[path.suffix](path)
        skipped = about.pop("skipped", {})
        return Embedding(
            features=arrays["features"],
            paths=tuple(paths),
            labels=np.asarray(arrays["label"], np.int64),
            start_s=arrays.get("start_s"),
            end_s=arrays.get("end_s"),
            skipped=skipped,
            about=about,
        )
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected features that mam2 embed wrote: {type(error).__name__}: {error}") from None


def _read_npy(path: Path) -> _Contents:
    about = json.loads(path.with_suffix(".json").read_text(encoding="ascii"))
    arrays = {name: np.array(about.pop(name), np.float64) for name in ("start_s", "end_s") if name in about}
    arrays |= {"features": np.load(path, mmap_mode="r"), "label": np.array(about.pop("labels"))}
    return arrays, about.pop("paths"), about


def _read_npz(path: Path) -> _Contents:
    with np.load(path) as file:
        arrays = dict(file)
    videos = json.loads(str(arrays.pop("paths")))
    return arrays, [videos[place] for place in arrays["video"]], json.loads(str(arrays.pop("about")))


def _read_safetensors(path: Path) -> _Contents:
    with open_safetensors(path) as file:
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 (no mapping)
        videos, about = (json.loads(file.metadata()[name]) for name in ("paths", "about"))
    return arrays, [videos[place] for place in arrays["video"]], about


def _read_parquet(path: Path) -> _Contents:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: parquet needs pyarrow (pip install pyarrow)")
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    times = [name for name in ("start_s", "end_s") if name in table.column_names]
    arrays = {name: table[name].to_numpy() for name in ("label", *times)}
    arrays["features"] = np.stack(table["feature"].to_numpy())
    return arrays, table["path"].to_pylist(), json.loads(table.schema.metadata[b"mam2"])


def _write_npy(out: Path, embedding: Embedding) -> None:
    with whole_file(out) as file:
        np.save(file, embedding.features)
    index = embedding.about | {"skipped": embedding.skipped, "paths": embedding.paths}
    index |= {name: array.tolist() for name, array in _columns(embedding).items()}
    index["labels"] = index.pop("label")
    # ASCII escapes represent every path, also one that is not UTF-8
    write_whole(out.with_suffix(".json"), json.dumps(index, indent=1) + "\n")


def _write_npz(out: Path, embedding: Embedding) -> None:
    videos, places = _videos(embedding)
    with whole_file(out) as file:
        np.savez(
            file,
            features=embedding.features,
            video=places,
            **_columns(embedding),
            paths=np.array(json.dumps(videos)),
            about=np.array(json.dumps(_about(embedding))),
        )


def _write_safetensors(out: Path, embedding: Embedding) -> None:
    from safetensors.numpy import save

    videos, places = _videos(embedding)
    arrays = {"features": np.asarray(embedding.features), "video": places, **_columns(embedding)}
    write_whole(out, save(arrays, {"paths": json.dumps(videos), "about": json.dumps(_about(embedding))}))


def _write_parquet(out: Path, embedding: Embedding) -> None:
    import pyarrow
    import pyarrow.parquet

    values = embedding.features.shape[1]
    columns = _columns(embedding)
    types = {name: pyarrow.from_numpy_dtype(array.dtype) for name, array in columns.items()}
    schema = pyarrow.schema(
        {"path": pyarrow.string(), **types, "feature": pyarrow.list_(pyarrow.float32(), values)},
        metadata={"mam2": json.dumps(_about(embedding))},
    )
    names = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in embedding.paths]
    with whole_file(out) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for first in range(0, len(names), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            flat = pyarrow.array(np.ascontiguousarray(embedding.features[rows]).ravel())
            arrays = [pyarrow.array(names[rows]), *(pyarrow.array(array[rows]) for array in columns.values())]
            arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, values))
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _table(embedding: Embedding) -> bytes:
    """Returns the CSV table: row number, path, class name, start and end in seconds."""
    assert embedding.start_s is not None
    assert embedding.end_s is not None
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("row", "path", "label", "start_s", "end_s"))
    classes = embedding.about["classes"]
    rows = zip(embedding.paths, embedding.labels, embedding.start_s, embedding.end_s, strict=True)
    for number, (path, label, start_s, end_s) in enumerate(rows):
        table.writerow((number, path, classes[label] if label >= 0 else "", f"{start_s:.3f}", f"{end_s:.3f}"))
    return text.getvalue().encode("utf-8", NAMES)


def _columns(embedding: Embedding) -> dict[str, Any]:
    """Returns arrays with one entry per feature vector, by their names in a file."""
    times = {"start_s": embedding.start_s, "end_s": embedding.end_s}
    return {"label": embedding.labels} | {name: array for name, array in times.items() if array is not None}


def _about(embedding: Embedding) -> dict[str, Any]:
    return embedding.about | {"skipped": embedding.skipped}


def _videos(embedding: Embedding) -> tuple[list[str], Any]:
    """Returns the videos, each once, and int64 [n], the index of each row's video among them."""
    places = {path: place for place, path in enumerate(dict.fromkeys(embedding.paths))}
    return list(places), np.array([places[path] for path in embedding.paths], np.int64)
