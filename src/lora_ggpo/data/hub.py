"""Tables from the Hugging Face hub."""

from __future__ import annotations

import datasets

from lora_ggpo.data.files import SPLIT_NAMES
from lora_ggpo.data.table import Table
from lora_ggpo.errors import UserError, first_line
from lora_ggpo.workspace.libraries import quiet_loading


def read_hub(name: str, subset: str | None) -> dict[str, Table]:
    """Return a hub dataset's tables by split, as `read_folder` does for files; no code of the dataset is run."""
    shown = f"{name} ({subset})" if subset else name
    try:
        with quiet_loading():
            loaded = datasets.load_dataset(name, subset)
    except Exception as error:  # what the hub client and the file readers behind it raise is open-ended
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"The data {shown} is no local file and could not be loaded from the hub ({reason}); "
            "check the name and data.subset, or give a local file or folder as data.source."
        ) from error
    found = {SPLIT_NAMES[str(split)]: (split, data) for split, data in loaded.items() if str(split) in SPLIT_NAMES}
    if not found:
        raise UserError(f"The hub data {shown} has no train, validation or test split, only {', '.join(loaded)}.")
    return {name: Table.of_arrow(data.data.table, f"{shown} {split}") for name, (split, data) in found.items()}
