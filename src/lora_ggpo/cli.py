"""The command line. Heavy libraries are imported inside the commands, so that help and usage errors come at once."""

from __future__ import annotations

import io
import logging
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from lora_ggpo.errors import DivergedError, UserError
from lora_ggpo.workspace.interrupt import exit_code, raise_terminated
from lora_ggpo.workspace.paths import expanded
from lora_ggpo.workspace.ranks import is_first

if TYPE_CHECKING:
    from lora_ggpo.comparison.plan import Plan
    from lora_ggpo.training.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune language models with LoRA-GGPO: recipes in, evaluated PEFT adapters out.",
)

USER_ERROR = 2


def place(text: str) -> str:
    """What a user names that may be a path, or not."""
    try:
        return expanded(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} {error}.") from error


def path(text: str | Path) -> Path:
    """A path that a user names; typer hands over its own defaults as well."""
    return Path(place(str(text)))


Debug = Annotated[bool, typer.Option("--debug", help="Show Python tracebacks and the libraries' own messages.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change, such as training.max_steps=50 or 'seeds=[0,1,2]'.")
]
RecipeFile = Annotated[Path, typer.Argument(parser=path, help="A YAML recipe; `lora-ggpo schema` describes it.")]
MethodsRecipe = Annotated[
    Path, typer.Argument(parser=path, help="A YAML recipe; methods change its adapter, ggpo and optimizer.")
]
RunFolder = Annotated[Path, typer.Argument(parser=path, help="A run folder: an output folder, or seed-N in it.")]
Base = Annotated[
    str | None,
    typer.Option("--model", parser=place, help="Of a run: where its base model lies now; it must be the same one."),
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")]
Ray = Annotated[str | None, typer.Option(help="Address of a Ray cluster to run on instead.")]
RayCpus = Annotated[int, typer.Option(min=0, help="Cores of a run on the cluster.")]
RayGpus = Annotated[float, typer.Option(min=0, help="GPUs of a run on the cluster.")]


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


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Fine-tune and evaluate as RECIPE says, once for each seed; resumes what is unfinished."""
    with _errors(debug):
        from lora_ggpo.recipe.source import read_source

        source = read_source(recipe, overrides or ())
        from lora_ggpo.recipe.recipe import check_recipe
        from lora_ggpo.training.run import train

        runs = train(check_recipe(source))
        if is_first():
            _print_metrics(runs)
            print(f"Runs: {', '.join(str(run.folder) for run in runs)}")


@app.command(name="plan")
def forecast(
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to time, after two that warm up.")] = 5,
    debug: Debug = False,
) -> None:
    """Say what RECIPE will take before it is run: parameters, memory, time, disk, and the batch that fits."""
    with _errors(debug):
        from lora_ggpo.recipe.source import read_source

        source = read_source(recipe, overrides or ())
        from lora_ggpo.recipe.recipe import check_recipe
        from lora_ggpo.report.forecast import batch_sentence, forecast_tables
        from lora_ggpo.training.forecast import forecast
        from lora_ggpo.workspace.progress import Reporter

        found = forecast(check_recipe(source), steps, Reporter())
        for table in forecast_tables(found):
            _stdout().print(table)
        print(batch_sentence(found))


@app.command(name="eval")
def evaluate(
    run: Annotated[
        str,
        typer.Argument(
            parser=place,
            help="A run folder, or seed-N in it; with --suite also a model: bundled name, folder or hub id.",
        ),
    ],
    on: Annotated[
        str | None,
        typer.Option(
            parser=place, help="Data to score on instead of the run's own: bundled name, file, folder or hub id."
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Generate and score: gsm8k, humaneval, mt-bench, or harness:TASK.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(parser=place, help="Problems: a file, folder or hub id; of a harness, a folder of task files."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Problems to do, from the first on; all by default.")] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each problem (1).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token (0).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the tokens that hold this probability (1).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer (512; mt-bench 1024).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws (0).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Answers generated at a time (16).")] = None,
    judge: Annotated[
        str | None,
        typer.Option(parser=place, help="mt-bench: address of an OpenAI-compatible server, or a model or run."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model's name on that server.")] = None,
    judge_prompts: Annotated[
        str | None, typer.Option(parser=place, help="FastChat's judge_prompts.jsonl, instead of our wording.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Programs run, or questions to the judge, at a time (4).")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template, or not; default: as trained.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a model's weights: float32, bfloat16 or float16 (float32).")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help='Of a model: what goes around a question, such as "Q: {text}\\nA: ".')
    ] = None,
    output: Annotated[
        str | None, typer.Option(parser=place, help="Folder of the results (RUN/seed-N/evaluation).")
    ] = None,
    base: Base = None,
    debug: Debug = False,
) -> None:
    """Score a finished run again, on other data, or by what it generates; resumes what is unfinished."""
    asked: dict[str, Any] = {
        "data": data,
        "limit": limit,
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch_size": batch_size,
        "judge": judge,
        "judge_model": judge_model,
        "judge_prompts": judge_prompts,
        "jobs": jobs,
        "chat": chat,
        "dtype": dtype,
        "template": template and template.replace("\\n", "\n"),
        "output": output,
    }
    with _errors(debug):
        if suite is None:
            evaluations = _evaluate_sets(run, on, asked, base)
        else:
            evaluations = _evaluate_suite(run, on, suite, asked, base)
        from lora_ggpo.report.tables import metrics_table

        _stdout().print(metrics_table(evaluations))


def _evaluate_sets(
    run: str, on: str | None, asked: dict[str, Any], base: str | None
) -> list[dict[str, dict[str, Any]]]:
    given = next((name for name, value in asked.items() if value is not None), None)
    if given:
        raise UserError(f"--{given.replace('_', '-')} is for what a run generates: give --suite as well.")
    from lora_ggpo.training.reuse import evaluate_run
    from lora_ggpo.training.run import find_runs

    return [evaluate_run(one.folder, on, base=base) for one in find_runs(Path(run))]


def _evaluate_suite(
    run: str, on: str | None, suite: str, asked: dict[str, Any], base: str | None
) -> list[dict[str, dict[str, Any]]]:
    if on is not None:
        raise UserError("--on is for the run's own scores; the problems of a suite are given as --data.")
    from lora_ggpo.evaluation.suites import Options, evaluate_suite
    from lora_ggpo.workspace.progress import Reporter

    return evaluate_suite(run, suite, Options(**asked), Reporter(), base)


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(parser=place, help="A run folder with one seed, a bundled model, a folder or a hub id.")
    ],
    system: Annotated[str | None, typer.Option(help="System message that each conversation begins with.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the tokens that hold this probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    base: Base = None,
    debug: Debug = False,
) -> None:
    """Try a run or a model in the terminal, or on the lines of a pipe."""
    with _errors(debug):
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


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(parser=path, help="A run folder with one seed, or seed-N in it.")],
    out: Annotated[Path, typer.Argument(parser=path, help="The folder to write.")],
    base: Base = None,
    debug: Debug = False,
) -> None:
    """Fold a run's adapter into the model's weights and save the plain model."""
    with _errors(debug):
        from lora_ggpo.training.merge import merge_run

        merged = merge_run(run, out, base)
        print(f"Merged model: {out}")
        reach = f"(logits reach {merged.largest:.2g})"
        print(f"Its logits differ from the adapter's by at most {merged.difference:.1e} {reach}.")
        if merged.quantised:
            kind, difference = merged.quantised
            print(f"They differ from the run's, whose model was in {kind}, by at most {difference:.1e}.")


@app.command()
def show(run: RunFolder, debug: Debug = False) -> None:
    """Show a run: recipe in short, metrics, loss curve."""
    with _errors(debug):
        from lora_ggpo.report.tables import sparkline
        from lora_ggpo.training.run import find_runs, summary

        runs = find_runs(run)
        print(summary(runs[0].recipe))
        _print_metrics([one for one in runs if one.metrics])
        for one in runs:
            losses = [row["loss"] for row in one.log if row.get("loss") is not None]
            state = "" if one.metrics else " (unfinished; give its `lora-ggpo train` command again)"
            print(f"{one.folder}{state}")
            if losses:
                print(f"  loss {sparkline(losses)} {losses[0]:.3f} to {losses[-1]:.3f}")
            if (one.folder / "training.png").is_file():
                print(f"  plot {one.folder / 'training.png'}")


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of recipes."""
    with _errors(debug):
        from lora_ggpo.recipe.recipe import json_schema

        print(json_schema())


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    output: Annotated[Path, typer.Option(parser=path, help="Folder of the runs, the table and the figure.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Compare LoRA with LoRA-GGPO on movie reviews with wrong labels in them."""
    with _errors(debug):
        from lora_ggpo.training.demo import run_demo

        result = run_demo(seeds, output, overrides or ())
        _stdout().print(result.table)
        print(result.verdict)
        print(f"Files: {output / 'results.md'}, {output / 'results.json'}, {output / 'demo.png'}")
        print(
            f"Adapters: {', '.join(str(run.folder / 'adapter') for runs in result.runs.values() for run in runs[:1])}"
        )


@app.command()
def compare(
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
    output: Annotated[Path, typer.Option(parser=path, help="Folder of the runs and the report.")] = Path(
        "runs/compare"
    ),
    jobs: Jobs = 1,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
    ray_gpus: RayGpus = 0,
    debug: Debug = False,
) -> None:
    """Compare methods: equal tuning, several seeds, paired statistics, one report; resumes what is unfinished."""
    with _errors(debug):
        from lora_ggpo.recipe.source import read_source

        source = read_source(recipe, overrides or ())
        from lora_ggpo.comparison.plan import make_plan
        from lora_ggpo.report.comparison import write_report

        plan = make_plan(source, _names(methods), seeds, trials, vary or (), metric, output)
        _carry_out(plan, jobs, ray, ray_cpus, ray_gpus)
        comparison = write_report(output)
        _stdout().print(comparison.table)
        print("\n".join(comparison.verdicts))
        print(f"Report: {output / 'report.html'}")


@app.command()
def study(
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
    output: Annotated[Path, typer.Option(parser=path, help="Folder of the runs and the report.")] = Path("runs/study"),
    jobs: Jobs = 1,
    ray: Ray = None,
    ray_cpus: RayCpus = 1,
    ray_gpus: RayGpus = 0,
    debug: Debug = False,
) -> None:
    """Find double descent over ranks, training steps, training rows or any setting; resumes what is unfinished."""
    with _errors(debug):
        from lora_ggpo.recipe.source import read_source

        source = read_source(recipe, overrides or ())
        from lora_ggpo.comparison.plan import make_study
        from lora_ggpo.report.study import write_study_report

        plan = make_study(source, _names(methods), seeds, axis or (), output)
        _carry_out(plan, jobs, ray, ray_cpus, ray_gpus)
        found = write_study_report(output)
        _stdout().print(found.table)
        print("\n".join(found.verdicts))
        print(f"Report: {output / 'report.html'}")


@app.command()
def sharpness(
    runs: Annotated[
        list[Path], typer.Argument(parser=path, help="Finished runs, or folders of seeds; the first is the baseline.")
    ],
    on: Annotated[Literal["train", "validation", "test"], typer.Option(help="Set to measure the loss on.")] = "train",
    rows: Annotated[int, typer.Option(min=1, help="Rows of it, at most.")] = 64,
    space: Annotated[
        Literal["weights", "adapter", "both"], typer.Option(help="Space of W0 + sBA, of A and B, or both.")
    ] = "both",
    sigma: Annotated[str, typer.Option(help="Sizes of the noise of expected sharpness.")] = "0.03,0.1,0.2",
    rho: Annotated[str, typer.Option(help="Radii of worst-case sharpness.")] = "0.0003,0.001",
    draws: Annotated[int, typer.Option(min=2, help="Pairs of draws of the noise, and draws of the trace.")] = 10,
    eigenvalues: Annotated[int, typer.Option(min=0, help="Top Hessian eigenvalues; 0 leaves the Hessian out.")] = 3,
    products: Annotated[int, typer.Option(min=9, help="Hessian products for eigenvalues, and for the density.")] = 45,
    plane: Annotated[int, typer.Option(min=0, help="Points a side of a two-dimensional slice; 0 draws none.")] = 0,
    output: Annotated[Path, typer.Option(parser=path, help="Folder of the measurements and figures.")] = Path(
        "runs/sharpness"
    ),
    base: Base = None,
    debug: Debug = False,
) -> None:
    """Measure how sharp the minima of RUNS are: rise of the loss under noise, at worst, and the Hessian."""
    with _errors(debug):
        from lora_ggpo.report.sharpness import write_sharpness_report
        from lora_ggpo.sharpness.measure import Settings, measure_runs
        from lora_ggpo.workspace.progress import Reporter

        if plane == 1:
            raise UserError("--plane 1 is a single point; give 2 or more a side, or 0 for no slice.")
        settings = Settings(
            split=on,
            rows=rows,
            spaces=("weights", "adapter") if space == "both" else (space,),
            sigmas=_sizes(sigma, "--sigma"),
            draws=draws,
            rhos=_sizes(rho, "--rho"),
            eigenvalues=eigenvalues,
            products=products,
            plane=plane,
        )
        measure_runs(runs, settings, output, Reporter(), base)
        report = write_sharpness_report(output)
        _stdout().print(report.table)
        print("\n".join(report.verdicts))
        print(f"Report: {output / 'sharpness.md'}, {output / 'figures'}")


def _sizes(text: str, option: str) -> tuple[float, ...]:
    try:
        sizes = tuple(float(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or not all(0 < size < float("inf") for size in sizes):
        raise UserError(f"{option} {text!r} is not a list of numbers above 0, such as 0.03,0.1.")
    return sizes


@app.command(name="methods")
def list_methods() -> None:
    """List the methods that `lora-ggpo compare` knows."""
    from lora_ggpo.methods.table import METHODS
    from lora_ggpo.report.tables import rows_table

    rows = [
        [method.name, method.title, method.source, ", ".join(f"{k}={v}" for k, v in method.settings.items())]
        for method in METHODS
    ]
    _stdout().print(rows_table(["name", "method", "arXiv", "settings"], rows))


def _names(methods: str) -> list[str]:
    return [name.strip() for name in methods.split(",") if name.strip()]


def _carry_out(plan: Plan, jobs: int, ray: str | None, ray_cpus: int, ray_gpus: float) -> None:
    from lora_ggpo.comparison.engine import run_comparison
    from lora_ggpo.comparison.pool import LocalPool, RayPool
    from lora_ggpo.workspace.progress import Reporter

    command = shlex.join(["lora-ggpo", *_without_placement(sys.argv[1:])])
    run_comparison(plan, lambda: RayPool(ray, ray_cpus, ray_gpus) if ray else LocalPool(jobs), command, Reporter())


def _without_placement(arguments: list[str]) -> list[str]:
    """The command without what decides only where it runs."""
    kept: list[str] = []
    for argument in arguments:
        if kept and kept[-1] in _PLACEMENT:
            kept.pop()
        elif argument.partition("=")[0] not in _PLACEMENT or argument in _PLACEMENT:
            kept.append(argument)
    return kept


_PLACEMENT = ("--jobs", "--ray", "--ray-cpus", "--ray-gpus")


def _print_metrics(runs: list[Run]) -> None:
    from lora_ggpo.report.tables import metrics_table

    evaluations = [run.metrics["evaluation"] for run in runs if run.metrics]
    if evaluations:
        _stdout().print(metrics_table(evaluations))


def _stdout() -> Console:
    # In a pipe rich assumes 80 columns and would fold the tables.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turn what stops a command into one line on stderr and an exit code."""
    try:
        with warnings.catch_warnings():
            if not debug:
                _calm()
            yield
    except UserError as error:
        # Of a distributed run every process finds the same fault, but a loss that is not finite.
        told = is_first() or isinstance(error, DivergedError)
        _stop(f"error: {error}" if told else None, USER_ERROR, debug)
    except KeyboardInterrupt as error:
        _stop(str(error) or "Interrupted.", exit_code(error), debug)
    except OSError as error:
        from lora_ggpo.workspace.files import refusal

        refused = refusal(error)
        if refused is None:
            raise
        _stop(f"error: {refused}", USER_ERROR, debug)


def _stop(message: str | None, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    if message:
        print(message, file=sys.stderr)
    raise typer.Exit(code)


def _calm() -> None:
    """Warnings as one line each; the libraries' notes to developers not at all."""

    def show(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.showwarning = show
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for a faster kernel as peft imports it
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # peft looks for a config.json beside the weights; a GGUF file carries its own
    warnings.filterwarnings("ignore", message="Could not find a config file in")


if __name__ == "__main__":
    main()
