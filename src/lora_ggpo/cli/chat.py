"""`lora-ggpo chat`."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from lora_ggpo.cli.options import Base, place
from lora_ggpo.errors import UserError


def command(
    model: Annotated[
        str, typer.Argument(parser=place, help="A run folder with one seed, a bundled model, a folder or a hub id.")
    ],
    system: Annotated[str | None, typer.Option(help="System message that each conversation begins with.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the tokens that hold this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    base: Base = None,
) -> None:
    """Chat with a run or a model in the terminal, or let it answer the lines of a pipe."""
    from lora_ggpo.evaluation.chat import Chat, run_chat
    from lora_ggpo.evaluation.generate import Sampling
    from lora_ggpo.evaluation.target import find_targets, load_target
    from lora_ggpo.workspace.progress import Reporter

    targets = find_targets(model)
    if len(targets) > 1:
        raise UserError(f"{model} holds {len(targets)} runs; choose one, such as {targets[0]}.")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may hold anything
    run_chat(Chat(load_target(targets[0], base=base), sampling, system), sys.stdin, Reporter().say)
