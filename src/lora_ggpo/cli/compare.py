"""`lora-ggpo compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_ggpo.cli.options import MethodsRecipe, Output, Overrides, path
from lora_ggpo.cli.output import print_report
from lora_ggpo.cli.placement import Jobs, Ray, RayCpus, RayGpus, carry_out, method_names, start_pool


def command(
    recipe: MethodsRecipe,
    overrides: Overrides = None,
    methods: Annotated[
        str,
        typer.Option(help="Methods, the baseline first, such as lora,dora,dora+ggpo; `lora-ggpo methods` lists them."),
    ] = "lora,ggpo",
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of each method.")] = 5,
    trials: Annotated[int, typer.Option(min=1, help="Tuning runs of each method; 1 takes its usual settings.")] = 4,
    vary: Annotated[
        list[str] | None, typer.Option(help="Data settings to compare in, such as data.label_noise=0,0.3; repeatable.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What is compared and tuned for.")] = None,
    output: Output = Path("runs/compare"),
    peft_results: Annotated[
        Path | None, typer.Option(parser=path, help="Results of PEFT's method_comparison to set beside these.")
    ] = None,
    jobs: Jobs = 1,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
    ray_gpus: RayGpus = 0,
) -> None:
    """Compare methods: equal tuning, several seeds, paired statistics, one report; resumes what is unfinished."""
    from lora_ggpo.recipe.source import read_source

    source = read_source(recipe, overrides or ())
    with start_pool(jobs, ray, ray_cpus, ray_gpus) as pool:
        from lora_ggpo.comparison.engine import advise
        from lora_ggpo.comparison.grid import plan_comparison

        grid = plan_comparison(source, method_names(methods), seeds, trials, vary or (), metric, output)
        beside = _read_peft(peft_results) if peft_results else None
        advise(grid)
        carry_out(grid, pool)
    from lora_ggpo.report.comparison import write_report
    from lora_ggpo.workspace.files import write_json_lines

    if beside:
        write_json_lines(output / "peft.jsonl", beside)
    print_report(write_report(output), output)


def _read_peft(folder: Path) -> list[dict[str, Any]]:
    """What is wrong with them is said before anything is run."""
    from lora_ggpo.report.method_comparison import read_peft_results

    return read_peft_results(folder)
