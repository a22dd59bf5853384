"""The command line: one module a command. Heavy libraries are imported inside the commands, so that help and usage
errors come at once."""

from __future__ import annotations

import io
import signal
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lora_ggpo.cli.errors import report_errors
from lora_ggpo.workspace.interrupt import exit_code, raise_terminated

COMMANDS = (
    *("train", "plan", "eval", "suite", "chat", "merge", "push", "show", "doctor", "schema"),
    *("demo", "compare", "study", "sharpness", "methods"),
)
"""Each is a module beside this one, with a function `command`; help lists them in this order."""


class _Group(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Read `eval RUN --suite NAME`, as release 0.1.0 had it, as `suite NAME RUN`."""
        if args[0] == "eval":
            args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--suite=") else [arg])]
            place = args.index("--suite") if "--suite" in args[:-1] else None
            if place:
                args = ["suite", args[place + 1], *args[1:place], *args[place + 2 :]]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for _name in COMMANDS:
    app.command(_name)(report_errors(import_module(f"lora_ggpo.cli.{_name}").command))


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lora-ggpo {version('lora-ggpo')}")
        raise typer.Exit


@app.callback()
def _describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models with LoRA-GGPO: recipes in, evaluated PEFT adapters out.

    Begin with `lora-ggpo demo`, or with one of the recipes of the repository: `lora-ggpo train recipes/NAME.yaml`.
    """


def main() -> None:
    """Entry point of ``lora-ggpo``: exits with 2 on bad input, 130 on Ctrl-C and 143 on SIGTERM."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal, or its locale, may not know every character
    signal.signal(signal.SIGTERM, raise_terminated)
    try:
        app()
    except KeyboardInterrupt as error:
        sys.exit(exit_code(error))
