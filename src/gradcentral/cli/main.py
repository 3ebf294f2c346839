"""The commands: parse, call, print."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from gradcentral import bench as benchmarks
from gradcentral import weight_layout
from gradcentral.bench.against import against_table, check_same_machine
from gradcentral.bench.report import conclusion, markdown_table, plot_benchmark, short_table, terminal_table
from gradcentral.bench.shapes import MODELS
from gradcentral.bench.steps import OURS
from gradcentral.cli import doctor
from gradcentral.cli.layout import build_model
from gradcentral.cli.terminal import encode_everything, exit_after, exit_after_interrupt, exit_with, signals_caught
from gradcentral.diagnostics.probing import DEFAULT_BATCHES
from gradcentral.experiment import Comparison, CustomTask, ExperimentError, ResultsError, TaskError, load_task
from gradcentral.experiment import compare as compare_task
from gradcentral.experiment.arms import ARMS, DEFAULT_ARMS
from gradcentral.experiment.loading import BUILT_IN
from gradcentral.experiment.output_folder import OutputFolder
from gradcentral.experiment.probing import probe_task
from gradcentral.experiment.training import check_device
from gradcentral.extras import MissingExtraError, own_version
from gradcentral.layout import report as layout_report
from gradcentral.paper.draw import FIGURES, STATEMENTS, draw_all, statement_table
from gradcentral.plotting import to_png

__all__ = ["run"]

_TASK_HELP = f"A Python file that defines `task`, or a built-in task: {', '.join(BUILT_IN)}."
_MODEL_HELP = (
    "MODULE:NAME of a model, or of a class or function that returns one (transformers:GPT2LMHeadModel); "
    "MODULE:EXPRESSION (\"timm:create_model('resnet18')\"); or a task file."
)
_WEIGHTS_HELP = "Trained weights of the task's network (a state dict), which initial-means shows too."
_START = """\b
Start here:
  gradcentral compare              train with and without GC on bundled data
  gradcentral compare --example    write a task file to edit
  gradcentral layout MODULE:MODEL  what GC would center in a model
  gradcentral COMMAND --help       options and an example
"""
EXAMPLE_FILE = Path("my_task.py")
_FIGURES_HELP = f"Some of {', '.join((*FIGURES, STATEMENTS))}; by default all."
Task = Annotated[str, typer.Argument(help=_TASK_HELP)]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs per run; by default the task's own.")]
Device = Annotated[str, typer.Option(help="Device to use, in torch's notation.")]
MixedPrecision = Annotated[bool, typer.Option("--amp", help="Use mixed precision.")]

# Not typer.echo, which writes UTF-8 to a stream that claims to be ASCII.
_print = partial(print, flush=True)

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=_START,
)


def _print_version(show: bool) -> None:
    if show:
        _print(f"gradcentral {own_version()}")
        raise typer.Exit


_VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")


@app.callback()
def _main(context: typer.Context, version: Annotated[bool, _VERSION] = False) -> None:
    """Gradient Centralization: where it acts, whether it helps, and what it costs."""
    if context.invoked_subcommand is None:
        _print(context.get_help())


@app.command(
    short_help="Whether GC helps: train with and without it.",
    epilog="Example: gradcentral compare my_task.py --seeds 10 --arms none,gradient",
)
def compare(
    task: Task = "digits",
    seeds: Annotated[str, typer.Option(help="Number of seeds, or a list; 5 means 0,1,2,3,4.")] = "5",
    epochs: Epochs = None,
    arms: Annotated[str, typer.Option(help=f"Some of {', '.join(ARMS)}, including none.")] = ",".join(DEFAULT_ARMS),
    optimizers: Annotated[str | None, typer.Option(help="Optimizers of the task; by default all.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Worker processes; by default one per core, 1 on a GPU.")] = None,
    backend: Annotated[str, typer.Option(help="Where workers run: loky (locally), ray or dask (a cluster).")] = "loky",
    device: Device = "cpu",
    amp: MixedPrecision = False,
    out: Annotated[Path | None, typer.Option(help="Output folder; by default runs/TASK.")] = None,
    resume: Annotated[bool, typer.Option(help="Reuse the finished runs in the folder, or move them aside.")] = True,
    example: Annotated[bool, typer.Option("--example", help=f"Write {EXAMPLE_FILE}, a task to edit.")] = False,
) -> None:
    """Train with and without GC on the same seeds and data order, and report whether GC helps."""
    if example:
        _write_example()
        return
    chosen = None if optimizers is None else _names(optimizers)
    how: dict[str, Any] = {"jobs": jobs, "backend": backend, "device": device, "amp": amp, "out": out, "resume": resume}
    try:
        comparison = compare_task(task, seeds=_seeds(seeds), epochs=epochs, arms=_names(arms), optimizers=chosen, **how)
    except KeyboardInterrupt:
        exit_after_interrupt("; finished runs are kept, and the same command continues from there")
    except ResultsError as error:
        if error.comparison is not None:  # only the report is missing
            _print_comparison(error.comparison)
        raise
    _print_comparison(comparison)
    _print(f"\nReport: {comparison.report}")


@app.command(short_help="Where GC acts, before training.", epilog="Example: gradcentral probe digits --out runs/probe")
def probe(
    task: Task = "digits",
    batches: Annotated[int, typer.Option(min=1, help="Number of the task's batches to use.")] = DEFAULT_BATCHES,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the initial weights and of the data order.")] = 0,
    device: Device = "cpu",
    amp: MixedPrecision = False,
    out: Annotated[Path | None, typer.Option(help="Folder for probe.csv and probe.png; by default none.")] = None,
) -> None:
    """Show what GC would remove from each layer's gradient, on real batches, before training."""
    out = None if out is None else Path.cwd() / out.expanduser()  # before the task's file, which may change the folder
    loaded = load_task(task)
    if isinstance(loaded, CustomTask):
        raise TaskError(
            f"task {loaded.name!r} has its own trainer; call gradcentral.probe(model, loss, batches) instead"
        )
    check_device(device, amp)
    folder = None if out is None else _claimed(out, "probe.csv", "probe.png")
    report = probe_task(loaded, seed=seed, batches=batches, device=device, amp=amp)
    _print(str(report))
    if folder is not None:
        path = folder.write("probe.csv", report.to_csv())
        folder.write("probe.png", to_png(report.plot(), f"{loaded.name}: where GC acts before training"))
        _print(f"\n{path} and probe.png")


@app.command(
    short_help="The paper's figures and statements, on a real network.",
    epilog="Example: gradcentral figures --only geometry,statements",
)
def figures(
    task: Annotated[str, typer.Option(help=_TASK_HELP)] = "digits",
    only: Annotated[str | None, typer.Option(help=_FIGURES_HELP)] = None,
    optimizer: Annotated[str | None, typer.Option(help="An optimizer of the task; by default its first.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds for results with a spread.")] = 5,
    epochs: Epochs = None,
    device: Device = "cpu",
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help=_WEIGHTS_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; by default runs/figures-TASK.")] = None,
) -> None:
    """Measure and draw the paper's figures and statements on a real network, as PNG, SVG and CSV."""
    chosen = None if only is None else _names(only)
    how: dict[str, Any] = {"seeds": seeds, "epochs": epochs, "device": device, "weights": weights}
    drawn = draw_all(task, out=out, only=chosen, optimizer=optimizer, **how)
    if drawn.statements:
        Console(highlight=False).print(statement_table(drawn.statements))
    for name, title in drawn.titles.items():
        _print(f"{drawn.out / name}.png  {title}")


@app.command(
    short_help="Which elements of each parameter form one weight vector.",
    epilog="Example: gradcentral layout torch.nn:Transformer",
)
def layout(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    only: Annotated[str, typer.Option(help="all, or conv for convolutions only.")] = "all",
    every: Annotated[bool, typer.Option("--every", help="One row per parameter, even where layers repeat.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which elements of each parameter form one weight vector, or why it is skipped."""
    try:
        built = build_model(model)
        found = weight_layout(built, only=only)
    except ValueError as error:
        exit_with(str(error))
    if as_json:
        _print(json.dumps(layout_report.as_json(built, found), indent=2))
    else:
        _print(layout_report.as_text(built, found, every=every))


@app.command(
    short_help="What GC costs: optimizer steps with and without it.",
    epilog="Example: gradcentral bench --models ResNet-50 --dtypes f32",
)
def bench(
    models: Annotated[str, typer.Option(help="Networks to measure.")] = ",".join(MODELS),
    optimizers: Annotated[str, typer.Option(help="Optimizers to measure.")] = "SGD,AdamW",
    dtypes: Annotated[str, typer.Option(help="Types of the parameters.")] = "f32,bf16",
    rounds: Annotated[int, typer.Option(min=3, help="Maximum number of timings per alternative.")] = 60,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time limit per row of the table.")] = 12.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads; by default torch's.")] = None,
    iteration: Annotated[bool, typer.Option(help="Also measure a training iteration of ResNet-18.")] = True,
    peers: Annotated[bool, typer.Option("--peers", help="Also measure the GC of pytorch_optimizer.")] = False,
    device: Annotated[str, typer.Option(help="Device to use: cpu or cuda.")] = "cpu",
    every: Annotated[bool, typer.Option("--all", help="Print all alternatives with their quartiles.")] = False,
    against: Annotated[Path | None, typer.Option(help="Also compare with this bench.json of the same machine.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.md and bench.png.")] = Path("runs/bench"),
) -> None:
    """Measure optimizer steps with and without GC on this machine, as ratios of interleaved timings."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        exit_with(f"--device {device}: torch found no CUDA device; use --device cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    typed = {name.replace("×", "x"): name for name in MODELS}  # as printed on a terminal that lacks the sign
    chosen = [typed.get(name, name) for name in _names(models)], _names(optimizers), _names(dtypes)
    try:
        earlier = None if against is None else benchmarks.Benchmark.read(against)
        cases = benchmarks.bench(*chosen, rounds=rounds, seconds=seconds, peers=peers, device=device)
        folder = _claimed(out, "bench.json", "bench.md", "bench.png")
        benchmark = benchmarks.Benchmark(machine=benchmarks.describe_machine(device))
        if earlier is not None:
            check_same_machine(benchmark.machine, earlier.machine)
        _print(", ".join(f"{name} {value}" for name, value in benchmark.machine.items()))
        for case in cases:
            benchmark.cases.append(case)
            times = f"{case.milliseconds:.2f} ms, with GC ÷ without {case.ratios[OURS]}"
            _print(f"{case.model} {case.dtype} {case.algorithm}: {times}")
    except ValueError as error:
        exit_with(str(error))
    if iteration:
        benchmark.cases.append(benchmarks.iteration(device=device, dtype="f32" if device == "cpu" else "bf16"))
    console = Console(width=210 if every else None, highlight=False)
    console.print(terminal_table(benchmark) if every else short_table(benchmark))
    if earlier is not None:
        console.print(against_table(benchmark, earlier))
    _print(conclusion(benchmark))
    path = folder.write("bench.json", benchmark.to_json())
    folder.write("bench.md", markdown_table(benchmark))
    folder.write("bench.png", plot_benchmark(benchmark))
    _print(f"\n{path}, bench.md and bench.png")


@app.command(
    name="doctor",
    short_help="Versions, kernels and devices in use, and a test of the kernels.",
    epilog="Example: gradcentral doctor",
)
def examine() -> None:
    """Print what a bug report needs, test the kernels on this machine, and list what to mend."""
    facts = doctor.describe()
    width = max(map(len, facts))
    for name, value in facts.items():
        _print(f"{name:{width}}  {value}")
    problems = doctor.problems()
    for problem in problems:
        _print(f"\n- {problem}")
    if not problems:
        _print("\nNo problem found.")
    elif any(problem.startswith(doctor.REPORT) for problem in problems):
        raise typer.Exit(1)


def _write_example() -> None:
    try:
        with EXAMPLE_FILE.open("x", encoding="utf-8") as file:
            file.write(BUILT_IN["wine"].read_text(encoding="utf-8"))
    except FileExistsError:
        exit_with(f"{EXAMPLE_FILE} exists already; rename it first")
    _print(f"Wrote {EXAMPLE_FILE}. Put your model and data into it, then run: gradcentral compare {EXAMPLE_FILE}")


def _print_comparison(comparison: Comparison) -> None:
    _print()
    Console(highlight=False).print(comparison)


def _claimed(out: Path, *names: str) -> OutputFolder:
    """Return the folder after checking, before the work, that these files can be written there."""
    folder = OutputFolder(out)
    folder.claim(names)
    return folder


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(seed) for seed in _names(text)] if "," in text else int(text)
    except ValueError:
        exit_with(f"seeds: give a number such as 5, or a list such as 0,3,7, not {text!r}")


def run() -> None:
    """Run the command line; an error that the user can correct prints one line on stderr and exits with code 2."""
    encode_everything()
    with signals_caught():
        try:
            status = app(standalone_mode=False)
            sys.stdout.flush()
        except (ExperimentError, MissingExtraError) as error:
            exit_with(str(error))
        except OSError as error:
            exit_after(error)
        except (KeyboardInterrupt, typer.Abort):
            exit_after_interrupt()
        except Exception as error:
            # The parser's own errors, whose class has different import paths in different versions of typer.
            if not hasattr(error, "format_message"):
                raise
            exit_with(f"{error.format_message()} See gradcentral --help.")
        if status == 130:  # newer versions of typer catch the interrupt and return this
            exit_after_interrupt()
    sys.exit(status)
