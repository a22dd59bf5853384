"""The axes of a grid: recipe settings and the values that they take."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from lora_ggpo.errors import UserError
from lora_ggpo.methods.table import PLAIN, RECIPE, Method, apart, each
from lora_ggpo.recipe.source import Source, yaml_value
from lora_ggpo.workspace.folder import leaves

Values = Mapping[str, Any]
"""Recipe settings by dotted key."""

RANK = "adapter.r"

NO_ADAPTER: Values = {RANK: 1, "adapter.lora_alpha": 1, "training.learning_rate": 0, "training.max_steps": 1}
"""What rank 0 stands for under a frozen head: B is 0 at the start, and a step at rate 0 leaves it there."""

FIXED = {"seeds": "use --seeds", "output": "use --output", "score_test": "leave it out"}
"""What the command decides, and what to do instead of setting it."""


def parse_axes(texts: Iterable[str], option: str, within: str = "") -> dict[str, tuple[Any, ...]]:
    """The values of each axis, by its key.

    Args:
        texts: ``key=value,value``, values in YAML; settings that take the same value are joined, ``key+key=value``.
        option: Name of the option that they were given with.
        within: What keys must begin with.

    Raises:
        UserError: one of them is not of this form, or has a key that is there already or that cannot vary.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        written = [value.strip() for value in values.split(",")]
        keys = apart([key])
        if not equals or not all(keys) or not all(one.startswith(within) for one in keys) or not all(written):
            example = f"{within}key=value,value, such as {'data.label_noise=0,0.3' if within else 'adapter.r=1,4,16'}"
            raise UserError(f"{option} {text!r} is not of the form {example}.")
        given = apart([*axes, key])
        for one in keys:
            if given.count(one) > 1:
                raise UserError(f"{option} {one} is given twice; give all its values at once, joined by commas.")
            if one in FIXED:
                raise UserError(f"{option} {one} is no setting that can vary; {FIXED[one]}.")
        axes[key] = tuple(yaml_value(value, text) for value in written)
    return axes


def recipe_values(values: Values) -> Values:
    """A setting as a recipe says it: settings that an axis joins apart, rank 0 as `NO_ADAPTER`."""
    found = each(values)
    return {**found, **NO_ADAPTER} if found.get(RANK) == 0 else found


def settings_of(axes: Mapping[str, tuple[Any, ...]]) -> dict[str, Values]:
    """All combinations of the values, by the names that tables give them; one named "" without axes."""
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return {setting_name(values, axes): values for values in combinations}


def axes_of(settings: Iterable[Values]) -> dict[str, list[Any]]:
    """The values of each axis, in order, of such combinations."""
    axes: dict[str, list[Any]] = {}
    for key, value in (item for values in settings for item in values.items()):
        found = axes.setdefault(key, [])
        if value not in found:
            found.append(value)
    return axes


def setting_name(values: Values, keys: Iterable[str]) -> str:
    """``r=4, label_noise=0.3``: the values of a setting, of which `keys` are all the axes."""
    names = short_names(keys)
    return ", ".join(f"{names[key]}={value}" for key, value in values.items())


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key (of joined ones, the first) where that tells them apart, else the whole key."""
    last = {key: key.partition("+")[0].rpartition(".")[2] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}


def refuse_fixed(method: Method, keys: Iterable[str], option: str) -> None:
    """Check that `method` leaves the axes to vary: what it is tuned by may, what makes it may not.

    Raises:
        UserError: it sets one of them, or sets the section of one to null.
    """
    if not method.plain:
        return
    used = {key.rpartition(".")[0] for key in method.settings}
    fixed = {key: value for key, value in {**PLAIN, **method.settings}.items() if key not in {*method.tuned, *used}}
    fixed |= {key: f"{factors[0]:g} times the recipe's" for key, factors in each(method.factors).items()}
    for key in apart(keys):
        for other, value in fixed.items():
            if key == other or other.startswith(f"{key}.") or (value is None and key.startswith(f"{other}.")):
                shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
                raise UserError(
                    f"{option} {key} cannot vary with method {method.name}, which sets {other} to {shown}; "
                    f"leave the method out, or use {RECIPE} for the recipe as it stands."
                )


def refuse_dropped(source: Source, methods: Iterable[Method]) -> None:
    """Check that no override is of a setting in whose place every method puts its own.

    Raises:
        UserError: one would change nothing.
    """
    if not all(method.plain for method in methods):
        return
    given = [
        (path, ".".join(map(str, leaf)), value)
        for path, override in source.overrides.items()
        for leaf, value in leaves(yaml_value(override.partition("=")[2], override), path).items()
    ]
    for path, key, value in given:
        dropped = next((other for other in PLAIN if f"{key}.".startswith(f"{other}.")), None)
        if dropped and not (key == dropped and value == PLAIN[dropped]):
            raise UserError(
                f"{source.where(path)} would change nothing: methods begin as plain LoRA with their own {dropped}; "
                f"add {RECIPE} to --methods, which is the recipe as it stands, or vary it: "
                f"lora-ggpo study --axis {key}=..."
            )
