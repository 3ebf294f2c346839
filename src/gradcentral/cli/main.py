"""The command line: parse, call, print. One small function a command."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from gradcentral import weight_layout
from gradcentral.cli.layout import build_model
from gradcentral.diagnostics.probing import DEFAULT_BATCHES
from gradcentral.experiment import CustomTask, ExperimentError, TaskError, load_task
from gradcentral.experiment import compare as compare_task
from gradcentral.experiment.probing import probe_task
from gradcentral.experiment.training import check_device
from gradcentral.extras import MissingExtraError
from gradcentral.layout import report as layout_report
from gradcentral.paper.draw import FIGURES, STATEMENTS, draw_all, statement_table
from gradcentral.plotting import to_png

__all__ = ["run"]

app = typer.Typer(
    help="Gradient Centralization, measured.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"gradcentral {metadata.version('gradcentral')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Gradient Centralization, measured."""


@app.command()
def compare(
    task: Annotated[
        str, typer.Argument(help="A Python file that defines `task`, or digits, digits-batchnorm, digits-vit.")
    ] = "digits",
    seeds: Annotated[str, typer.Option(help="How many seeds, or which: 5 means 0,1,2,3,4.")] = "5",
    epochs: Annotated[int | None, typer.Option(help="Instead of the task's own.")] = None,
    arms: Annotated[str, typer.Option(help="Of none, gradient and update; none must be there.")] = (
        "none,gradient,update"
    ),
    optimizers: Annotated[str | None, typer.Option(help="Of the task's; by default all of them.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Worker processes; by default one a CPU core, and 1 on an accelerator.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Where the workers are: loky (this machine), or the cluster of ray or dask.")
    ] = "loky",
    device: Annotated[str, typer.Option(help="Where to train, as torch names it.")] = "cpu",
    amp: Annotated[bool, typer.Option("--amp", help="Train in mixed precision.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Output folder; by default runs/ and the task's name.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Use the finished runs in the folder, or move them aside.")
    ] = True,
) -> None:
    """Train with and without GC, same seeds, same data order, and say whether it helped."""
    comparison = compare_task(
        task,
        seeds=_seeds(seeds),
        epochs=epochs,
        arms=_names(arms),
        optimizers=None if optimizers is None else _names(optimizers),
        jobs=jobs,
        backend=backend,
        device=device,
        amp=amp,
        out=out,
        resume=resume,
    )
    console = Console(highlight=False)
    console.print()
    console.print(comparison)
    console.print(f"\nReport: {comparison.report}", soft_wrap=True)


@app.command()
def probe(
    task: Annotated[
        str, typer.Argument(help="A Python file that defines `task`, or digits, digits-batchnorm, digits-vit.")
    ] = "digits",
    batches: Annotated[int, typer.Option(min=1, help="How many of the task's batches.")] = DEFAULT_BATCHES,
    seed: Annotated[int, typer.Option(min=0, help="Of the fresh weights and the order of the batches.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run, as torch names it.")] = "cpu",
    amp: Annotated[bool, typer.Option("--amp", help="In mixed precision.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for probe.csv and probe.png; without it nothing is written.")
    ] = None,
) -> None:
    """Show what GC would do to each layer's gradient, on real batches, before any training."""
    loaded = load_task(task)
    if isinstance(loaded, CustomTask):
        raise TaskError(f"task {loaded.name!r} has a trainer of its own: call gradcentral.probe(model, loss, batches)")
    check_device(device, amp)
    report = probe_task(loaded, seed=seed, batches=batches, device=device, amp=amp)
    typer.echo(str(report))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "probe.csv").write_text(report.to_csv(), encoding="utf-8")
        (out / "probe.png").write_bytes(to_png(report.plot(), f"{loaded.name}: where GC acts before training"))
        typer.echo(f"\n{out / 'probe.csv'} and probe.png")


@app.command()
def figures(
    task: Annotated[
        str, typer.Option(help="A Python file that defines `task`, or digits, digits-batchnorm, digits-vit.")
    ] = "digits",
    only: Annotated[str | None, typer.Option(help=f"Of {', '.join((*FIGURES, STATEMENTS))}; by default all.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="One of the task's; by default its first.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs the numbers with a spread are of.")] = 5,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the task's own.")] = None,
    device: Annotated[str, typer.Option(help="Where to train and measure, as torch names it.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Output folder; by default runs/figures- and the task's name.")
    ] = None,
) -> None:
    """Measure and draw the paper's figures and statements on a real network: PNG, SVG and CSV."""
    chosen = None if only is None else _names(only)
    drawn = draw_all(task, out=out, only=chosen, optimizer=optimizer, seeds=seeds, epochs=epochs, device=device)
    console = Console(highlight=False)
    if drawn.statements:
        console.print(statement_table(drawn.statements))
    for name, title in drawn.titles.items():
        console.print(f"{drawn.out / name}.png  {title}", soft_wrap=True)


@app.command()
def layout(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="MODULE:NAME of a model or of what makes one (transformers:GPT2LMHeadModel), MODULE:EXPRESSION "
            "(\"timm:create_model('resnet18')\"), or a task file.",
        ),
    ],
    only: Annotated[str, typer.Option(help="all, or conv for the convolutions alone.")] = "all",
    every: Annotated[bool, typer.Option("--every", help="A row for each parameter, also where layers repeat.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show which elements of each parameter make one weight vector, or why it is left alone."""
    try:
        built = build_model(model)
        found = weight_layout(built, only=only)
    except ValueError as error:
        raise TaskError(str(error)) from error
    if as_json:
        typer.echo(json.dumps(layout_report.as_json(built, found), indent=2, ensure_ascii=False))
    else:
        typer.echo(layout_report.as_text(built, found, every=every))


@app.command()
def bench(
    models: Annotated[str | None, typer.Option(help="Of those in the table; by default all.")] = None,
    optimizers: Annotated[str, typer.Option(help="Of SGD and AdamW.")] = "SGD,AdamW",
    dtypes: Annotated[str, typer.Option(help="Of f32 and bf16.")] = "f32,bf16",
    rounds: Annotated[int, typer.Option(min=3, help="How often each alternative is timed, at most.")] = 60,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long one row may take.")] = 12.0,
    threads: Annotated[int | None, typer.Option(min=1, help="By default as many as torch takes.")] = None,
    iteration: Annotated[
        bool, typer.Option("--iteration/--no-iteration", help="Also a whole training iteration of ResNet-18.")
    ] = True,
    peers: Annotated[bool, typer.Option("--peers", help="Also other libraries' GC, where installed.")] = False,
    device: Annotated[str, typer.Option(help="Where, as torch names it: cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and bench.png.")] = Path("runs/bench"),
) -> None:
    """Measure optimizer steps with and without GC on this machine, as ratios in one run."""
    import torch

    from gradcentral.bench import runs, table
    from gradcentral.bench.shapes import MODELS
    from gradcentral.bench.steps import OURS

    if threads is not None:
        torch.set_num_threads(threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise TaskError(f"--device {device}: torch finds no CUDA device here")
    benchmark = runs.Benchmark(machine=runs.machine(device))
    console = Console(highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in benchmark.machine.items()), soft_wrap=True)
    chosen = list(MODELS) if models is None else _names(models)
    how: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "peers": peers, "device": device}
    try:
        for case in runs.bench(chosen, _names(optimizers), _names(dtypes), **how):
            benchmark.cases.append(case)
            ours = case.ratios[OURS]
            typer.echo(f"{case.model} {case.dtype} {case.algorithm}: {case.milliseconds:.2f} ms, ours ÷ that {ours}")
    except ValueError as error:
        raise TaskError(str(error)) from error
    if iteration:
        benchmark.cases.append(runs.iteration(device=device, dtype="f32" if device == "cpu" else "bf16"))
    benchmark.write(out / "bench.json")
    table.plot(benchmark, out / "bench.png")
    (out / "bench.md").write_text(table.markdown(benchmark), encoding="utf-8")
    Console(width=210, highlight=False).print(table.table(benchmark))
    console.print(table.verdict(benchmark), soft_wrap=True)
    typer.echo(f"\n{out / 'bench.json'}, bench.md and bench.png")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(seed) for seed in _names(text)] if "," in text else int(text)
    except ValueError:
        raise TaskError(f"seeds: give a number such as 5, or a list such as 0,3,7, not {text!r}") from None


def run() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit code 2."""
    interrupted = "interrupted; the finished runs are kept, the same command goes on from there"
    try:
        status = app(standalone_mode=False)
    except (ExperimentError, MissingExtraError) as error:
        _end(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _end(interrupted, 130)
    except Exception as error:
        # The errors of typer's parser; where their class lives has changed with its versions.
        if not hasattr(error, "format_message"):
            raise
        _end(f"{error.format_message()} (gradcentral --help)", 2)
    if status == 130:  # newer versions of typer turn the interrupt into this
        _end(interrupted, 130)
    sys.exit(status)


def _end(message: str, code: int) -> NoReturn:
    print(f"gradcentral: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
