"""What only the `cli` extra installs, hidden as if it were absent: `pytest -p tests.core_only`, or import it first."""

import re
import sys
import tomllib
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _normal(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def _needed(requirements):
    """The distributions that the requirements stand for, with all that these need in turn."""
    found, left = set(), {_normal(one) for one in requirements}
    while left:
        found |= left
        asked = set()
        for name in left:
            try:
                asked |= {_normal(one) for one in metadata.requires(name) or () if "extra ==" not in one}
            except metadata.PackageNotFoundError:
                continue  # for another platform
        left = asked - found
    return found


_DISTRIBUTIONS = _needed(PROJECT["optional-dependencies"]["cli"]) - _needed(
    [*PROJECT["dependencies"], "pytest", "pytest-xdist"]
)
HIDDEN = {
    module
    for module, names in metadata.packages_distributions().items()
    if {_normal(name) for name in names} <= _DISTRIBUTIONS
} | {"sklearn"}
"""Top-level modules of the packages that the extra installs and the core does not; and scikit-learn, which the tests
install, which transformers imports where it is there, and which would miss scipy."""


class _CoreOnly(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else PathFinder.find_spec(name, path, target)


sys.meta_path[:] = [_CoreOnly if finder is PathFinder else finder for finder in sys.meta_path]
