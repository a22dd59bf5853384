"""Entry point of ``lora-ggpo``: the command line, or one sentence where only the core of the package is installed."""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires


def main() -> None:
    """Run the command line; exits with 2 if packages are missing that it needs."""
    missing = _missing()
    if missing:
        names = f"{', '.join(missing[:-1])} and {missing[-1]}" if missing[1:] else missing[0]
        print(f"error: The command line needs {names}; install with: pip install 'lora-ggpo[cli]'", file=sys.stderr)
        sys.exit(2)
    from lora_ggpo import cli

    cli.main()


def _missing() -> list[str]:
    """The packages of the ``cli`` extra that are not installed."""
    extra = [line for line in requires("lora-ggpo") or () if re.search(r"""extra == ["']cli["']""", line)]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in extra]
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
