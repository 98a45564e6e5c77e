"""Launch tables: which architecture's rows apply to a device."""

import importlib.resources
import json
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mam2.kernels import cube, launch
from mam2.kernels.products import add_product

CPU = torch.device("cpu")
TABLES = {"default": {"a": [[512, 1], [1024, 2]], "b": [[64, 8]]}, "sm_90": {"a": [[512, 4], [1024, 16]]}}


class Calls(TorchDispatchMode):
    """The operators called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(function)
        if function is torch.ops.aten.addmm.dtype_out:  # torch 2.11 fails to compute it on meta tensors
            return kwargs["out"]
        return function(*args, **(kwargs or {}))


@pytest.fixture
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WARPS", TABLES)


def pretend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(launch, "architecture", lambda device: name)


@pytest.mark.usefixtures("_tables")
def test_rows_by_block_and_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [launch.warps("a", block, CPU) for block in (1, 512, 513, 1024, 5000)] == [1, 1, 2, 2, 2]
    assert launch.warps("a", 512, CPU, scattered=True) == 2
    assert launch.table_for(CPU) == "default"
    pretend(monkeypatch, "sm_90")
    assert launch.table_for(CPU) == "sm_90"
    assert [launch.warps("a", block, CPU) for block in (512, 513)] == [4, 16]
    assert launch.warps("b", 1, CPU) == 8  # sm_90 has no row of its own for it
    pretend(monkeypatch, "sm_61")
    assert launch.table_for(CPU) == "default"


@pytest.mark.usefixtures("_tables")
def test_a_kernel_without_a_row() -> None:
    with pytest.raises(ValueError, match=r"launch_table.json lists \(a, b\), found 'c'"):
        launch.warps("c", 1, CPU)


def test_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor, gcnArchName = 9, 0, "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    named = launch.architecture.__wrapped__
    assert named(CPU) == "cpu"
    assert named(torch.device("cuda", 0)) == "sm_90"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert named(torch.device("cuda", 0)) == "gfx942"


def test_chunks_are_multiples_of_128(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK_BYTES", {"default": 1 << 20, "sm_90": 1 << 22})
    assert launch.chunk_rows(512, torch.float32, CPU) == 512
    assert launch.chunk_rows(10**6, torch.float32, CPU) == 128
    pretend(monkeypatch, "sm_90")
    assert launch.chunk_rows(512, torch.float32, CPU) == 2048


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended H100."""
    pretend(monkeypatch, "sm_90")
    monkeypatch.setattr(launch, "CHUNK_BYTES", {"default": 1 << 27})
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("_gpu")
def test_chunks_on_a_gpu_fill_it_and_are_no_smaller_than_the_weight() -> None:
    gpu, half = torch.device("cuda", 0), torch.bfloat16
    assert launch.chunk_rows(8192, half, gpu, 384) == 5632  # 44 x 3 tiles for 132 multiprocessors
    assert launch.chunk_rows(1024, half, gpu, 384) == 11 * 5632
    assert launch.chunk_rows(32000, half, gpu, 384) == 2048
    assert launch.chunk_rows(128256, half, gpu, 4096) == 4096
    assert launch.chunk_rows(128256, half, gpu, 1100) == 1152


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("rows", "width", "codes", "chunks"), [(90112, 384, 8192, 16), (16384, 4096, 128256, 4)])
def test_products_of_a_head_on_a_gpu(
    rows: int, width: int, codes: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors: how often the weight is read, and that its gradient is summed in float32 without a temporary.

    A head of 128 k codes reads its weight of 1 GiB no more often than its logits.
    """
    monkeypatch.setattr(launch, "run_kernel", lambda *_, **__: None)
    monkeypatch.setenv("MAM2_KERNELS", "triton")
    on_a_gpu, gpu = launch.chunk_rows, torch.device("cuda", 0)
    monkeypatch.setattr(launch, "chunk_rows", lambda size, dtype, _, width: on_a_gpu(size, dtype, gpu, width))
    monkeypatch.setattr(launch, "wide_sums", lambda device: True)
    run = importlib.import_module("mam2.kernels.linear_cross_entropy")._run
    with Calls() as calls:
        hidden, weight = (torch.empty(size, width, dtype=torch.bfloat16, device="meta") for size in (rows, codes))
        target = torch.empty(rows, dtype=torch.int64, device="meta")
        run(hidden, weight, None, target, None, -100, 0.0, torch.bfloat16, (True, True, False))
    aten = torch.ops.aten
    assert calls.functions.count(aten.mm.out) == 2 * chunks
    assert calls.functions.count(aten.addmm.dtype_out) == chunks
    assert aten.mm.dtype not in calls.functions
    in_cache = 2 * codes * width < 20e6
    assert in_cache or 2 * chunks * codes * width <= 2 * rows * codes


@pytest.mark.parametrize(
    ("capability", "half_sums", "hip", "wide", "in_one_pass"),
    [
        ((8, 0), False, None, True, True),
        ((7, 5), False, None, False, False),
        ((9, 0), True, None, False, False),
        ((7, 5), False, "7", True, False),
    ],
)
def test_products_keep_float32_where_the_gpu_can(
    capability: tuple[int, int],
    half_sums: bool,
    hip: str | None,
    wide: bool,
    in_one_pass: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which product is called, on meta tensors."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launch, "half_sums", lambda: half_sums)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = launch.wide_products(gpu), launch.wide_sums(gpu)
    assert found == (wide, in_one_pass)
    monkeypatch.setattr(launch, "wide_products", lambda device: found[0])
    monkeypatch.setattr(launch, "wide_sums", lambda device: found[1])
    with Calls() as calls:
        total = torch.empty(4, 4, device="meta")
        add_product(total, *(torch.empty(4, 4, dtype=torch.float16, device="meta") for _ in range(2)))
    assert (torch.ops.aten.addmm.dtype_out in calls.functions) == in_one_pass
    assert (torch.ops.aten.mm.dtype in calls.functions) == (wide and not in_one_pass)


@pytest.mark.parametrize(
    ("video", "patch", "rows_are_whole"),
    [
        (torch.zeros(2, 4, 8, 8, 3).permute(0, 4, 1, 2, 3), (2, 4, 4), True),
        (torch.zeros(2, 3, 4, 8, 8), (2, 4, 4), False),
        (torch.zeros(2, 1, 4, 8, 8), (2, 4, 4), True),
        (torch.zeros(2, 1, 4, 8, 16)[..., ::2], (2, 4, 4), False),
        (torch.zeros(2, 4, 8, 8, 6)[..., ::2].permute(0, 4, 1, 2, 3), (2, 4, 4), False),
        (torch.zeros(2, 4, 8, 8, 6)[..., :3].permute(0, 4, 1, 2, 3), (2, 4, 4), False),
        (torch.zeros(2, 4, 8, 8, 6)[..., :3].permute(0, 4, 1, 2, 3), (2, 4, 1), True),
    ],
    ids=["channels_last", "planes", "gray", "every other pixel", "channels apart", "pixels apart", "one pixel wide"],
)
def test_a_patch_row_without_gaps_is_read_in_wide_pieces(
    video: torch.Tensor, patch: tuple[int, int, int], rows_are_whole: bool
) -> None:
    pytest.importorskip("triton")
    assert cube.cube_meta(video, patch, torch.float32)["CHANNELS_LAST"] == rows_are_whole


@pytest.mark.parametrize(
    ("width", "clip", "other", "expected"),
    [
        (16, torch.uint8, torch.bfloat16, (8, 8, 64)),
        (16, torch.float32, torch.bfloat16, (8, 8, 64)),
        (16, torch.uint8, torch.float32, (4, 4, 128)),
        (16, torch.uint8, None, (16, 16, 32)),
        (14, torch.uint8, torch.bfloat16, (14, 2, 32)),  # strips of 2 pixels would take 256 rows for 224
        (12, torch.uint8, torch.bfloat16, (12, 4, 32)),
        (3, torch.float64, torch.float64, (3, 1, 32)),
    ],
)
def test_a_run_is_what_a_thread_stores_at_once(
    width: int, clip: torch.dtype, other: torch.dtype | None, expected: tuple[int, int, int]
) -> None:
    """Pixels per strip, pixels per run, and strips, of patches of 2 frames of 16 rows."""
    pytest.importorskip("triton")
    video = torch.zeros(1, 3, 2, 16, width, dtype=clip)
    meta = cube.cube_meta(video, (2, 16, width), torch.float32, other)
    assert (meta["PIXELS"], meta["RUN"], meta["ROWS"]) == expected


def test_the_file() -> None:
    text = importlib.resources.files("mam2.kernels").joinpath("launch_table.json").read_text(encoding="utf-8")
    tables = json.loads(text)
    assert set(tables) == {"warps", "chunk_bytes"}
    assert "default" in tables["warps"]
    assert "default" in tables["chunk_bytes"]
    for kernels in tables["warps"].values():
        assert set(kernels) <= set(tables["warps"]["default"])
        for rows in kernels.values():
            blocks = [block for block, _ in rows]
            assert blocks == sorted(set(blocks))
            assert all(warps in (1, 2, 4, 8, 16) for _, warps in rows)
