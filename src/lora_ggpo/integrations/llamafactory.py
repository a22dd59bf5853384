"""LLaMA-Factory with GGPO: ``lora-ggpo-llamafactory train CONFIG``, where the file may have a section ``ggpo``.

It does what ``llamafactory-cli train CONFIG`` does, with one more callback.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ..errors import UserError
from ..perturbation import GGPOConfig
from .callback import GGPOCallback

MODULE = "lora_ggpo.integrations.llamafactory"
USAGE = "usage: lora-ggpo-llamafactory train CONFIG.yaml [NAME=VALUE ...]"


def main() -> None:
    """The command, for a mistake of the user's with exit code 2."""
    try:
        _run(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def _run(arguments: list[str]) -> None:
    if arguments[:1] != ["train"] or not "".join(arguments[1:2]).endswith((".yaml", ".yml")):
        raise UserError(USAGE)
    if (count := _processes()) > 1:
        from torch.distributed import run

        run.main(["--standalone", f"--nproc-per-node={count}", "-m", MODULE, *arguments])
        return
    try:
        from llamafactory.train.tuner import read_args, run_exp
    except ModuleNotFoundError as error:
        raise UserError(f"LLaMA-Factory cannot be imported ({error}): pip install llamafactory") from None

    sys.argv[1:] = arguments[1:]  # where LLaMA-Factory reads the file and what overrides it
    settings = read_args()
    run_exp(settings, callbacks=[GGPOCallback(_config(settings.pop("ggpo", None)))])


def _processes() -> int:
    """The processes to start here, as LLaMA-Factory counts them: none where torchrun has started this one."""
    import torch

    return 0 if "RANK" in os.environ else int(os.environ.get("NPROC_PER_NODE", torch.accelerator.device_count()))


def _config(section: Any) -> GGPOConfig:
    if not isinstance(section or {}, dict):
        raise UserError(f"The section ggpo must hold settings, such as sigma: 0.03, not {section!r}.")
    try:
        return GGPOConfig.from_dict(section or {})
    except ValueError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    main()
