"""`lora-ggpo suite`."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

import typer

from lora_ggpo.cli.options import Base, Place, place, with_line_breaks
from lora_ggpo.cli.output import print_table


def command(
    context: typer.Context,
    suite: Annotated[str, typer.Argument(help="gsm8k, humaneval, mt-bench, or harness:TASK.")],
    run: Annotated[str, typer.Argument(parser=place, help="A run folder, or a model: bundled name, folder or hub id.")],
    data: Annotated[Place, typer.Option(parser=place, help="Problems; of a harness, a folder of task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Problems to do, from the first on; all by default.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each problem (1).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token (0).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the tokens that hold this probability (1).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer (512; mt-bench 1024).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draws (0).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Answers generated at a time (16).")] = None,
    judge: Annotated[Place, typer.Option(parser=place, help="mt-bench: a server's address, or a model or run.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model's name on that server.")] = None,
    judge_prompts: Annotated[Place, typer.Option(parser=place, help="FastChat's judge_prompts.jsonl.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Programs run, or judgements asked for, at a time (4).")
    ] = None,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template, or not; default: as trained.")] = None,
    dtype: Annotated[str | None, typer.Option(help="A model's type: float32, bfloat16 or float16 (float32).")] = None,
    template: Annotated[
        str | None,
        typer.Option(parser=with_line_breaks, help='Around a question to a model, such as "Q: {text}\\nA: ".'),
    ] = None,
    output: Annotated[Place, typer.Option(parser=place, help="Folder of the results (RUN/seed-N/evaluation).")] = None,
    base: Base = None,
) -> None:
    """Score what RUN, a run or a model, generates on a suite of problems; continues what is unfinished."""
    from lora_ggpo.evaluation.suite_run import Options
    from lora_ggpo.evaluation.suites import evaluate_suite
    from lora_ggpo.report.tables import metrics_table
    from lora_ggpo.workspace.progress import Reporter

    options = Options(**{field.name: context.params[field.name] for field in fields(Options)})
    print_table(metrics_table(evaluate_suite(run, suite, options, Reporter(), base)))
