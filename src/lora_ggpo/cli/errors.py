"""Errors of all commands: each becomes one line on stderr and an exit code."""

from __future__ import annotations

import functools
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.workspace.interrupt import exit_code
from lora_ggpo.workspace.libraries import quiet_bitsandbytes
from lora_ggpo.workspace.ranks import is_first

USER_ERROR = 2

_Debug = Annotated[bool, typer.Option("--debug", help="Show Python tracebacks and the libraries' own messages.")]


def report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option --debug; without it an error is one line."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **options: Any) -> None:
        try:
            with warnings.catch_warnings():
                if not debug:
                    _calm_libraries()
                command(*args, **options)
        except (UserError, KeyboardInterrupt, OSError) as error:
            message, code = _message_and_code(error)
            if debug:
                traceback.print_exc()
            if message:
                print(message, file=sys.stderr)
            raise typer.Exit(code) from None

    signature = inspect.signature(command, eval_str=True)
    switch = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), switch])  # type: ignore[attr-defined]
    return run


def _message_and_code(error: UserError | KeyboardInterrupt | OSError) -> tuple[str | None, int]:
    """What to print, and the exit code. An OSError that the user can do nothing about is raised again."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Interrupted.", exit_code(error)
    if isinstance(error, UserError):
        # All processes of a distributed run find the same fault, except for a loss that is not finite.
        told = is_first() or isinstance(error, DivergedError)
        return f"error: {error}" if told else None, USER_ERROR
    from lora_ggpo.workspace.files import refusal

    refused = refusal(error)
    if refused is None:
        raise error
    return f"error: {refused}", USER_ERROR


def _calm_libraries() -> None:
    """Show warnings as one line each, and leave out the libraries' notes to developers."""

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show
    quiet_bitsandbytes()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # peft looks for a config.json beside the weights; a GGUF file carries its own
    warnings.filterwarnings("ignore", message="Could not find a config file in")
