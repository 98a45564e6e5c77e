"""The decoder of each video in a loader: chosen at its start, and PyAV from then on where NVDEC fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from mam2.engine.config.training import DataConfig
from mam2.engine.data.dali import dali_version
from mam2.engine.data.decoder_share import nvdec_keeps
from mam2.engine.data.manifest import Manifest
from mam2.engine.data.nvdec import MOST_FAILURES, Record, broken_codecs
from mam2.engine.data.sampling import frame_step
from mam2.engine.data.video_decoders import NVDEC_SIZES, choose_decoder
from mam2.engine.errors import UserError


class AssignedDecoders:
    """Maps the index of a video in the manifest to the name of its decoder."""

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        device: torch.device,
        *,
        info: Callable[[str], None],
        refuse: Callable[[int, str], None],
    ) -> None:
        """info: receives lines for the log. refuse: called with the index of each video that has no decoder, and why.

        Raises UserError where no video has a decoder.
        """
        self._info, self._automatic = info, config.decoder == "auto"
        self._record = Record()
        self._names: dict[int, str] = {}
        dali, broken = bool(dali_version()), {}
        if device.type == "cuda" and dali and config.channels == 3 and config.decoder in ("auto", "nvdec"):
            codecs = {video.codec for video in manifest.videos}
            broken = broken_codecs(codecs.intersection(NVDEC_SIZES), device, config)
            for codec, problem in broken.items():
                info(f"data    NVDEC does not decode {codec} here ({problem}): PyAV decodes it")
        refusal = UserError("the manifest holds no videos")
        for index, video in enumerate(manifest.videos):
            try:
                if config.sampling == "dense":
                    frame_step(video, config)  # raises if data.fps is set and the video has no frame rate
                self._names[index] = choose_decoder(
                    video.codec,
                    device,
                    config.decoder,
                    dali=dali,
                    channels=config.channels,
                    broken=broken,
                    **video.traits,
                )
            except UserError as error:
                refusal = error
                refuse(index, str(error))
        if config.nvdec_share:
            self.give_to_pyav(config.nvdec_share)
        if not self._names:
            raise UserError(f"{manifest.videos[-1].path}: {refusal}") if manifest.videos else refusal

    def __getitem__(self, video: int) -> str:
        return self._names[video]

    @property
    def usable(self) -> list[int]:
        """Indices of the videos that have a decoder, ascending."""
        return sorted(self._names)

    def count(self) -> dict[str, int]:
        """Returns the number of videos per decoder."""
        return dict(Counter(self._names.values()))

    def videos_of(self, decoder: str) -> list[int]:
        """Returns the indices of a decoder's videos, ascending."""
        return sorted(index for index, name in self._names.items() if name == decoder)

    def give_to_pyav(self, share: float) -> None:
        """Leaves NVDEC this share of its videos, 0 to 1, and gives PyAV the others, unless `data.decoder` is nvdec."""
        if self._automatic:
            given = (index for index in self.videos_of("nvdec") if not nvdec_keeps(index, share))
            self._names.update(dict.fromkeys(given, "pyav"))

    def record(self, decoder: str, reason: str | None) -> None:
        """Records the result of a clip, None where it was decoded. Many failures in a row switch NVDEC off."""
        if decoder == "nvdec" and self._record.note(reason is None):
            self.switch_nvdec_off(f"it failed on {MOST_FAILURES} files in a row, last: {reason}")

    def fall_back(self, video: int, failed: str) -> bool:
        """Returns whether PyAV may decode a video on which the decoder `failed` has failed.

        A video of NVDEC is PyAV's from then on: rebuilding NVDEC's graph for every such file would make the step wait.
        """
        if failed in ("pyav", "array") or not self._automatic:
            return False
        if failed == "nvdec":
            self._names[video] = "pyav"
        return True

    def switch_nvdec_off(self, why: str) -> None:
        """Gives all videos of NVDEC to PyAV, unless the config asks for NVDEC alone."""
        given = self.videos_of("nvdec")
        if given and self._automatic:
            self._names.update(dict.fromkeys(given, "pyav"))
            self._info(
                f"data    NVDEC is switched off for this run: {why}. PyAV decodes all videos; mam2 doctor tests NVDEC"
            )
