"""Measure where Gradient Centralization helps: the runs and the tables of docs/should-i-use-it.md.

    python benchmarks/evidence.py data --out build/evidence-data    copy the data that the tasks need to one folder
    python benchmarks/evidence.py search --out DIR                  find learning rates without GC
    python benchmarks/evidence.py run --jobs 15 --minutes 8 --out DIR    train; the same command continues
    python benchmarks/evidence.py confirm --out DIR                 repeat the strongest findings on fresh seeds
    python benchmarks/evidence.py report                            rewrite the page's tables and the figures

`run` searches for learning rates first where DIR and benchmarks/results have none; tuned.json of the package is a copy
of what it chose. On a machine without scikit-learn,
set GRADCENTRAL_DATA to the folder that `data` wrote. `run --device cuda --scale paper` trains ResNet-18 on CIFAR-100
for 200 epochs, which takes hours, if GRADCENTRAL_DATA contains cifar-100-python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import evidence_runs as runs

from gradcentral.experiment.tasks import SUITE
from gradcentral.experiment.tasks.optimizers import OPTIMIZERS, Rates
from gradcentral.experiment.tasks.sources import DATA, DIABETES, FASHION, TEXT, diabetes, find
from gradcentral.json_lines import append

RESULTS = Path(__file__).resolve().parent / "results"
SEARCH, RATES = "search.jsonl", "tuned.json"
RUNS, PROBES, CONFIRMED = "runs.jsonl", "probes.jsonl", "confirmation.jsonl"


def prepare_data(out: Path) -> None:
    """Copy Fashion-MNIST and the text from where they are found, and write the data of scikit-learn as text."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*FASHION, TEXT):
        if find(name).resolve() != (out / name).resolve():
            shutil.copyfile(find(name), out / name)
    inputs, target = diabetes()
    rows = [",".join(f"{x:.7g}" for x in [*row, *value]) for row, value in zip(inputs.tolist(), target.tolist())]  # noqa: B905
    (out / DIABETES).write_text("\n".join(rows) + "\n")


def begin(out: Path, *names: str) -> None:
    """Create the folder, and copy to it the files with which an earlier stage continues."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (out / name).exists() and (RESULTS / name).exists():
            shutil.copyfile(RESULTS / name, out / name)


def search(pool: runs.Pool, tasks: Sequence[str], out: Path) -> dict[str, dict[str, Rates]]:
    """Search where the folder and the results have no rates yet, and write all rates to ``tuned.json``."""
    begin(out, SEARCH, RATES)
    chosen = json.loads((out / RATES).read_text(encoding="utf-8")) if (out / RATES).exists() else {}
    best = runs.search(pool, tasks, out / SEARCH, chosen)
    (out / RATES).write_text(json.dumps(chosen | best, indent=1) + "\n", encoding="utf-8")
    return best


def run(pool: runs.Pool, tasks: Sequence[str], out: Path, seeds: int, more: int) -> None:
    """Search if needed, probe, and train the grid."""
    begin(out, RUNS, PROBES)
    best = search(pool, tasks, out)
    complete = [task for task in tasks if len(best.get(task, {})) == len(OPTIMIZERS)]
    probed = {record["task"] for record in runs.read_records(out / PROBES)}
    for record in pool.results(runs.probe_record, ((task,) for task in complete if task not in probed)):
        append(out / PROBES, json.dumps(record) + "\n")
    cells = runs.grid(complete, lambda task, optimizer: best[task][optimizer], seeds, more)
    done, total = runs.run_all(pool, cells, out / RUNS)
    print(f"{done} of {total} runs are in {out / RUNS}; rates were chosen for {len(complete)} of {len(tasks)} tasks")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("data", "search", "run", "confirm", "report"))
    parser.add_argument("--out", type=Path, help="folder for the files; for `report`, the results to read")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, with one thread each")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after so many minutes")
    parser.add_argument("--tasks", default=",".join(SUITE), help="some of the tasks, by default all")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of every cell")
    parser.add_argument("--more-seeds", type=int, default=10, help="seeds of the cells at the best learning rate")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; cuda only with --scale paper")
    parser.add_argument("--scale", choices=("small", "paper"), default="small")
    parser.add_argument("--epochs", type=int, help="epochs with --scale paper, by default 200")
    options = parser.parse_args(given)
    if options.command != "report" and options.out is None:
        parser.error(f"{options.command} needs --out DIR")
    if unknown := {*options.tasks.split(",")} - {*SUITE}:
        parser.error(f"--tasks: unknown {', '.join(sorted(unknown))}; choose from {', '.join(SUITE)}")
    if options.scale == "small" and (options.device != "cpu" or options.epochs is not None):
        parser.error("--device and --epochs are for --scale paper; the small tasks train on the CPU")
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Run one command."""
    options = arguments(given)
    tasks = options.tasks.split(",")
    if options.command == "data":
        prepare_data(options.out)
        print(f"{options.out}: set {DATA} to this folder")
        return
    if options.command == "report":
        from evidence_page import write_page

        print("\n".join(map(str, write_page(options.out or RESULTS))))
        return
    with runs.Pool(options.jobs, options.minutes) as pool:
        if options.scale == "paper":
            options.out.mkdir(parents=True, exist_ok=True)
            cells = runs.grid_of_paper(options.seeds)
            done, total = runs.run_all(pool, cells, options.out / "paper.jsonl", options.device, options.epochs)
            print(f"{done} of {total} runs are in {options.out / 'paper.jsonl'}")
        elif options.command == "search":
            search(pool, tasks, options.out)
        elif options.command == "run":
            run(pool, tasks, options.out, options.seeds, options.more_seeds)
        else:
            from evidence_analysis import strongest

            begin(options.out, RUNS, CONFIRMED)
            cells = strongest(runs.read_records(options.out / RUNS))
            done, total = runs.run_all(pool, cells, options.out / CONFIRMED)
            print(f"{done} of {total} runs are in {options.out / CONFIRMED}")
    if pool.failed:
        sys.exit(f"{pool.failed} runs failed; the messages above name them")


if __name__ == "__main__":
    if not os.environ.get(DATA) and Path("build/evidence-data").is_dir():
        os.environ[DATA] = str(Path("build/evidence-data").resolve())
    main()
