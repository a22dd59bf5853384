"""The data that comes with the package: reviews, and general text. bundled/README.md says how it was made."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from importlib import resources
from pathlib import Path

from lora_ggpo.data.files import parse_jsonl
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError

LABELS = ["negative", "positive"]
BUNDLED = {  # name -> sha256 of the file's content before compression
    "movie-reviews": "60a147f589b939e75f526f1cebd0a06144a7824d06b07b8a1cb51b40e2772617",
    "amazon-reviews": "83358dc157ba319d8a5e9d38e046ad4804564b66afa4dabecde0b99e6c0218c3",
}
GENERAL_TEXT = "general-text"
_GENERAL_TEXT_SHA256 = "384495f051ee330c7c6c39743d45139071c97e95611a0b0ed73c1f769c904bca"


def read_bundled(name: str) -> dict[str, Table]:
    """Return the train, validation and test tables of a bundled set: id, text, rating (-4 to 4), label."""
    table = _read(name, BUNDLED[name])
    columns, tables = dict(table.columns), {}
    splits = list(columns.pop("split"))
    for split in ("train", "validation", "test"):
        rows = [row for row, value in enumerate(splits) if value == split]
        kept = {name: [values[row] for row in rows] for name, values in columns.items()}
        tables[split] = Table(table.origin, kept, table.unit, [table.positions[row] for row in rows], {"label": LABELS})
    return tables


def read_bundled_text() -> Table:
    """Return the bundled general text: id, text."""
    return _read(GENERAL_TEXT, _GENERAL_TEXT_SHA256)


def _read(name: str, sha256: str) -> Table:
    file = resources.files("lora_ggpo.data") / "bundled" / f"{name}.jsonl.gz"
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"The bundled data {file} is missing or altered; install lora-ggpo again.")
    return parse_jsonl(Path(f"{name}.jsonl"), content)
