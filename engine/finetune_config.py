"""What a fine-tuning run is: the tables of its recipes, beside those that pre-training has as well."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mam2.engine.config import (
    DataConfig,
    OptimConfig,
    RunConfig,
    UserError,
    check_positive,
    check_training,
)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Of the encoder that is fine-tuned. The checkpoint decides; the values serve where there is none (`--scratch`)."""

    patch: int = 16
    """Height and width of a patch in pixels."""
    tubelet: int = 2
    """Frames a token spans."""
    width: int = 768
    """Embedding width."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over the embedding width."""
    layer_scale: float = 0.0
    """First value of LayerScale, see `ModelConfig`; any but 0 where the checkpoint has it. 0: no LayerScale."""
    frames: int = 0
    """Frames of the clips that it was pre-trained on: its positions at another size are resampled from theirs; 0: as
    `data.frames`."""
    size: int = 0
    """Height and width of those clips in pixels; 0: as `data.size`."""
    classes: int = 0
    """Classes that the head tells apart; the training videos decide."""
    text_width: int = 0
    """Values of a text embedding, 0 for a linear head; the embeddings decide."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    dropout: float = 0.0
    """Share of the pooled features that a step leaves out, 0 to 1."""
    text_embeddings: str = ""
    """File with a text embedding for every class, which become the classifier: .npy or .safetensors, see
    `mam2.engine.model.text_classes`. Empty: a linear head, drawn at random."""
    text_encoder: str = ""
    """Folder of a text encoder of transformers that embeds the class names instead."""
    prompt: str = "a video of a person {}."
    """What the text encoder reads, with the class name for {}."""
    frozen: bool = True
    """Keep the text embeddings as they are; false trains them too."""
    temperature: float = 0.01
    """Cosines are divided by it, at first; learned from there."""


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Beside crop and mirroring, which [data] has. Drawn for each clip, the same for all of its frames."""

    operations: int = 4
    """RandAugment's n: operations in a row, each drawn anew; 0 turns RandAugment off."""
    magnitude: float = 7.0
    """RandAugment's m, 0 to 10."""
    magnitude_std: float = 0.5
    """Deviation of the normal distribution, around `magnitude`, that each operation's is drawn from."""
    share: float = 0.5
    """Chance that a drawn operation is carried out, 0 to 1."""
    erase: float = 0.25
    """Chance that a box of the clip is replaced by noise, 0 to 1."""
    mixup: float = 0.8
    """Alpha of the Beta distribution of mixup's weight; 0 turns it off."""
    cutmix: float = 1.0
    """Alpha of that of cutmix's share of the frame; 0 turns it off. With both on, each has half of the pairs."""
    label_smoothing: float = 0.1
    """Share of the target that goes to all classes evenly, 0 to 1."""

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    epochs: float = 100
    """Passes over the data set; each shows every video once, in `data.views` views."""
    warmup_epochs: float = 5
    """Linear warm-up of the learning rate from 0."""
    base_lr: float = 1e-3
    """Peak learning rate for a batch of 256 clips, views counted; scaled linearly with the batch."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine for a batch of 256 clips; scaled likewise."""
    beta2: float = 0.999
    """AdamW's second beta; the first is 0.9."""
    layer_decay: float = 0.75
    """Each block's learning rate over that of the block above it; the head has the full one."""
    drop_path: float = 0.1
    """Chance that the last block's branches are left out for a clip; falls linearly to 0 at the first block."""
    ema: float = 0.0
    """Decay of the moving average of the weights that validation and RUN/best then use; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Validation shows each video's middle clip in one view; `mam2 evaluate` shows these many."""

    every: float = 1.0
    """Epochs between two validations of a fine-tuning run; there is always one at the end."""
    temporal: int = 5
    """Clips of a video: dense ones evenly from its start to its end, uniform ones interleaved."""
    spatial: int = 3
    """Square crops of a clip at full short side, evenly along the longer side."""
    batch: int = 0
    """Most clips in a forward pass; 0: as many as a training pass has, in `mam2 evaluate` 32."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    data: DataConfig = field(default_factory=DataConfig)
    model: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    test: ViewsConfig = field(default_factory=ViewsConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        side = self.data.size // self.model.patch
        return self.data.frames // self.model.tubelet, side, side

    @property
    def patch_size(self) -> tuple[int, int, int]:
        """Frames, height and width of a token."""
        return self.model.tubelet, self.model.patch, self.model.patch

    @property
    def together(self) -> int:
        """Clips that must be in one pass: the views of a video, or of two that are mixed."""
        return self.data.views * (2 if self.augment.mixes else 1)

    def check(self) -> None:
        """Raises UserError for values that cannot work together, naming key, expectation and remedy."""
        model, head, augment, optim, test = self.model, self.head, self.augment, self.optim, self.test
        check_training(self, model.patch, model.tubelet)
        if model.width % model.heads:
            raise UserError(f"model.width {model.width} is not a multiple of model.heads {model.heads}")
        shares: dict[str, Any] = {
            "head.dropout": head.dropout,
            "augment.share": augment.share,
            "augment.erase": augment.erase,
            "augment.label_smoothing": augment.label_smoothing,
            "optim.drop_path": optim.drop_path,
            "optim.ema": optim.ema,
        }
        for name, value in shares.items():
            if not 0 <= value <= 1 or (value == 1 and name in ("head.dropout", "optim.drop_path", "optim.ema")):
                raise UserError(f"{name} must be from 0 to 1 (dropout, drop path and averaging below 1), found {value}")
        if not 0 <= augment.magnitude <= 10 or augment.magnitude_std < 0 or augment.operations < 0:
            raise UserError(
                f"augment.magnitude {augment.magnitude}, augment.magnitude_std {augment.magnitude_std}, "
                f"augment.operations {augment.operations}: expected a magnitude from 0 to 10, the others not negative"
            )
        if min(augment.mixup, augment.cutmix) < 0:
            raise UserError(
                f"augment.mixup {augment.mixup} and augment.cutmix {augment.cutmix} must not be negative; 0 turns off"
            )
        if not 0 < optim.layer_decay <= 1:
            raise UserError(f"optim.layer_decay must be above 0, at most 1 (off), found {optim.layer_decay}")
        if head.text_embeddings and head.text_encoder:
            raise UserError("head.text_embeddings and head.text_encoder both give the text embeddings: name one")
        if head.text_encoder and "{}" not in head.prompt:
            raise UserError(f"head.prompt needs {{}} where the class name goes, found {head.prompt!r}")
        if test.batch < 0:
            raise UserError(f"test.batch must not be negative, found {test.batch}")
        check_positive(
            {
                "head.temperature": head.temperature,
                "test.every": test.every,
                "test.temporal": test.temporal,
                "test.spatial": test.spatial,
            }
        )
