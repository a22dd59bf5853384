"""`lora-ggpo study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_ggpo.cli.options import MethodsRecipe, Output, Overrides
from lora_ggpo.cli.output import print_report
from lora_ggpo.cli.placement import Jobs, Ray, RayCpus, RayGpus, carry_out, method_names, start_pool


def command(
    recipe: MethodsRecipe,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="Methods, such as lora,ggpo, or recipe; `lora-ggpo methods` lists them.")
    ] = "lora,ggpo",
    axis: Annotated[
        list[str] | None,
        typer.Option(
            help="A setting and its values, such as adapter.r=1,4,16,64 or data.label_noise=0,0.3; repeatable."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method in each setting.")] = 5,
    output: Output = Path("runs/study"),
    jobs: Jobs = 1,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
    ray_gpus: RayGpus = 0,
) -> None:
    """Find double descent over ranks, training steps, training rows or any setting; resumes what is unfinished."""
    from lora_ggpo.recipe.source import read_source

    source = read_source(recipe, overrides or ())
    with start_pool(jobs, ray, ray_cpus, ray_gpus) as pool:
        from lora_ggpo.comparison.engine import advise
        from lora_ggpo.comparison.grid import plan_study

        grid = plan_study(source, method_names(methods), seeds, axis or (), output)
        advise(grid)
        carry_out(grid, pool)
    from lora_ggpo.report.study import write_study_report

    print_report(write_study_report(output), output)
