"""Metadata of config fields: which keys a resumed run may change."""

import pytest

from mam2.engine.config.finetune import EncoderConfig, FinetuneConfig
from mam2.engine.config.limits import resumable_keys
from mam2.engine.config.pretrain import PretrainConfig

RUN = (
    "log_every save_every keep keep_every compile compile_blocks graph device sharding recompute max_nonfinite profile"
)
DATA = "sets threads nvdec_threads prefetch max_unusable timeout_s wait_s workers"
SHARED = {
    *(f"run.{key}" for key in RUN.split()),
    *(f"data.{key}" for key in DATA.split()),
    "optim.micro_batch",
    "run.tracker",
}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (
            PretrainConfig,
            {
                *("tokenizer.cache", "validation.every", "validation.videos"),
                *("model.frames", "model.size"),  # of the checkpoint
            },
        ),
        (
            FinetuneConfig,
            {
                *(f"model.{name}" for name in EncoderConfig.__dataclass_fields__),  # of the checkpoint
                *(f"test.{name}" for name in ("temporal", "spatial", "batch")),
            },
        ),
    ],
)
def test_only_what_does_not_change_the_result_may_differ_when_a_run_is_resumed(kind, own):
    """Keys on this list must not change what a run learns; adding or removing one is a decision."""
    assert resumable_keys(kind) == SHARED | own
