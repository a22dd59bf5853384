"""`lora-ggpo train`."""

from __future__ import annotations

from lora_ggpo.cli.options import Overrides, RecipeFile
from lora_ggpo.cli.output import print_metrics
from lora_ggpo.workspace.libraries import importing
from lora_ggpo.workspace.ranks import is_first


def command(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Fine-tune and evaluate as RECIPE says, once for each seed; resumes what is unfinished."""
    from lora_ggpo.recipe.source import read_source

    source = read_source(recipe, overrides or ())  # what is wrong in it is said before the heavy imports
    with importing():
        from lora_ggpo.recipe.recipe import check_recipe
        from lora_ggpo.training.run import train

    runs = train(check_recipe(source))
    if not is_first():
        return
    from lora_ggpo.report.calibration import save_calibration_plot  # matplotlib takes a second, when there is time
    from lora_ggpo.report.plots import save_training_plot

    for run in runs:
        if not (run.folder / "training.png").is_file():
            save_training_plot(run.log, run.folder / "training.png")
            save_calibration_plot(run, run.folder / "calibration.png")
    print_metrics(runs)
    print(f"Runs: {', '.join(str(run.folder) for run in runs)}")
