"""`mam2 convert-tokenizer`: converts a checkpoint of taming-transformers to safetensors."""

from __future__ import annotations

from pathlib import Path

import tyro

from mam2.engine.commands.options import run_verb
from mam2.engine.errors import UserError


def run(arguments: list[str]) -> int:
    def convert_tokenizer(checkpoint: tyro.conf.Positional[Path], out: Path) -> int:
        """Convert a VQGAN checkpoint to safetensors. Every shape is checked, and no code in the file is executed.

        Args:
            checkpoint: taming-transformers' last.ckpt, or safetensors with its parameter names.
            out: output file, ending in .safetensors; pass it to `--tokenizer.path`.
        """
        from mam2.engine.tokenizer.files import fingerprint, read_vqgan, save_vqgan
        from mam2.engine.tokenizer.vqgan import CONFIGS

        if out.suffix != ".safetensors":
            raise UserError(f"--out {out}: expected a name that ends in .safetensors")
        if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
            raise UserError(f"--out {out}: is the checkpoint itself; choose another file")
        vqgan, left_out = read_vqgan(checkpoint)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            save_vqgan(vqgan, out)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
        config = vqgan.config
        name = next((name for name, known in CONFIGS.items() if known == config), "none of the published models")
        parameters = sum(parameter.numel() for parameter in vqgan.parameters())
        print(f"found    {name}: {config.codes} codes, quantizer {config.quantizer}, {config.factor} pixels per code")
        print(f"kept     {parameters / 1e6:.1f} M parameters, every shape as expected; {len(left_out)} others dropped")
        print(f"written  {out}, fingerprint {fingerprint(vqgan)[:12]}")
        return 0

    return run_verb(convert_tokenizer, arguments, "convert-tokenizer")
