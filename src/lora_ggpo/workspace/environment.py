"""The machine and the libraries as they may be shown to others: no names of people, no places on this machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_LIBRARIES = (
    *("lora-ggpo", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "trl"),
    *("huggingface_hub", "bitsandbytes", "torchao", "triton", "deepspeed", "liger-kernel", "flash-attn"),
    *("axolotl", "unsloth", "ms-swift", "llamafactory", "lightning", "diffusers"),
)

BYPASSES = {
    "axolotl": "its lora_mlp_kernel, lora_qkv_kernel and lora_o_kernel read the weights of a layer and never call it",
    "unsloth": "its fast LoRA reads the weights of a layer and never calls it",
}
"""Libraries with kernels that noise does not reach."""


def installed() -> dict[str, str]:
    """Versions of those libraries, of all that a run may use, that are installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """Versions, device, precisions and what ``auto`` chooses here, in words."""
    import torch

    libraries, on_cpu = installed(), not torch.accelerator.is_available()
    fast = is_fast_in_bf16(on_cpu)
    bf16 = "bf16" if fast else "bf16 (emulated, slower)"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **libraries,
        "device": _processor() if on_cpu else _accelerators(),
        "precisions": f"fp32, {bf16}" if on_cpu else f"fp32, fp16, {bf16}",
        "precision: auto": "bf16" if fast else "fp32",
        **{f"beware of {name}": f"{why}: switch it off" for name, why in BYPASSES.items() if name in libraries},
    }


def is_fast_in_bf16(on_cpu: bool) -> bool:
    """Whether the processor has instructions for bf16; others emulate it, at half the speed of float32."""
    import torch

    if on_cpu:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def shown(place: str | Path) -> str:
    """A path as others may see it: from the working directory or ``~`` on, or else its last part. What is no path from
    the root is left as it is."""
    if not os.path.isabs(place):
        return str(place)
    for root, sign in ((Path.cwd(), ""), (Path.home(), "~")):
        if Path(place).is_relative_to(root):
            return str(Path(sign) / Path(place).relative_to(root))
    return Path(place).name


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text, the columns below one another."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _processor() -> str:
    import torch

    facts, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if facts.exists():
        lines = facts.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"CPU, {name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"


def _accelerators() -> str:
    import torch

    kind, number = str(torch.accelerator.current_accelerator()), torch.accelerator.device_count()
    if not torch.cuda.is_available():
        return f"{number} x {kind}"
    first = torch.cuda.get_device_properties(0)
    rest = "" if number == 1 else "; start one process each, with torchrun or accelerate launch"
    capability = f"compute capability {first.major}.{first.minor}"
    return f"{number} x {first.name}, {first.total_memory / 2**30:.0f} GiB, {capability}{rest}"
