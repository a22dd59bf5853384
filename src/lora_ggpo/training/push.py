"""Upload what a run has trained to a hub."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from lora_ggpo.errors import UserError, first_line
from lora_ggpo.recipe.recipe import load_recipe
from lora_ggpo.training.folder import find_runs, finished_metrics, weights_folder
from lora_ggpo.training.identity import check_weights

# Those of the HTTP library, which differs by release.
_OF_THE_LINE = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)


def push_run(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload the weights of a finished run, with their card, and return the address of the commit.

    The token is that of ``hf auth login`` or HF_TOKEN, the hub that of HF_ENDPOINT.

    Args:
        folder: A run folder with one seed, or seed-N in it.
        repository: ``name`` or ``owner/name``; it is made if it is not there.
        private: Whether only its owner sees one that is made.

    Raises:
        UserError: the run is unfinished, of several seeds, or has other weights than it ended with; or the hub refuses.
    """
    runs = find_runs(folder)
    if len(runs) > 1:
        raise UserError(f"{folder} holds {len(runs)} seeds; give one of them, such as {runs[0].folder}.")
    (run,) = runs
    weights = weights_folder(run.folder, load_recipe(run.folder / "recipe.yaml"))
    check_weights(weights, finished_metrics(run))
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=made.repo_id, folder_path=weights, commit_message=f"Upload {run.folder.absolute().parent.name}"
        )
    except LocalTokenNotFoundError as error:
        raise UserError("The hub needs a token: log in by `hf auth login`, or set HF_TOKEN.") from error
    except HFValidationError as error:
        raise UserError(f"{repository!r} cannot be the name of a repository: {first_line(error)}") from error
    except _OF_THE_LINE as error:
        raise UserError(f"The hub has not taken {weights}: {first_line(error)}") from error
    return str(done.commit_url)
