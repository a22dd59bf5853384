"""GGPO in ms-swift 4: this file for ``--external_plugins`` registers the callback ``ggpo`` for ``--callbacks``.

ms-swift has no arguments for a plugin. Each setting is an environment variable with the name of a field of GGPOConfig,
such as ``GGPO_SIGMA=0.03``: in the shell, or under ``ENV`` in ms-swift's YAML file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from swift.callbacks import callbacks_map

from lora_ggpo.integrations.callback import GGPOCallback  # not relative: ms-swift loads this file by its path
from lora_ggpo.perturbation import GGPOConfig

PREFIX = "GGPO_"


def config_from(environment: Mapping[str, str]) -> GGPOConfig:
    """The settings in the variables that begin with ``GGPO_``.

    Raises:
        ValueError: a variable is no field of the configuration, or its value is outside the field's range.
    """
    named = {name: text for name, text in environment.items() if name.startswith(PREFIX)}
    return GGPOConfig.from_dict({name.removeprefix(PREFIX).lower(): _value(text) for name, text in named.items()})


def _value(text: str) -> Any:
    """A number, true, false or null, as JSON and YAML write them; anything else is a word."""
    try:
        return json.loads(text.lower())
    except json.JSONDecodeError:
        return text


def make_callback(args: Any, trainer: Any) -> GGPOCallback:
    """What ms-swift calls, with its arguments and its Trainer, for ``--callbacks ggpo``."""
    return GGPOCallback(config_from(os.environ))


callbacks_map["ggpo"] = make_callback
