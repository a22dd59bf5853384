"""Carry out one run of a comparison in a worker process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.workspace.libraries import quiet_bitsandbytes

FAILURE = "failed.json"


def carry_out(name: str, values: dict[str, Any], folder: Path) -> None:
    """Train and score the recipe `values`, of which `name` is the file, in its `folder`.

    A run that fails by itself, such as by a loss that is not finite, leaves `FAILURE` there: it is a result too.

    Raises:
        UserError: what would stop the other runs as well.
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    quiet_bitsandbytes()
    import torch

    from lora_ggpo.recipe.recipe import check_recipe
    from lora_ggpo.recipe.source import Source
    from lora_ggpo.training.run import train
    from lora_ggpo.workspace.files import write_json
    from lora_ggpo.workspace.progress import Reporter

    warnings.simplefilter("ignore")  # every run would give them again
    try:
        train(check_recipe(Source(name, values, {}, {})), Reporter(quiet=True))
    except DivergedError as error:
        write_json(folder / FAILURE, {"message": str(error)})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
