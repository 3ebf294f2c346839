"""The examples, commands and links of README.md and docs/ work."""

from __future__ import annotations

import importlib
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradcentral
from gradcentral.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))


def blocks(language: str) -> list[Any]:
    """Return every fenced block of a language, with an id such as ``README.md-0``."""
    return [
        pytest.param(page, code, id=f"{page.name}-{position}")
        for page in PAGES
        for position, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S))
        if page.name != "jax-and-keras.md"  # tests/integrations runs it, where JAX and Keras are installed
    ]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).float().mean()


class Mixture(nn.Module):
    """A custom layer whose parameters no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList([torch.randn(4, 3), torch.randn(4, 3)])
        self.scale = nn.Parameter(torch.ones(2, 4))


class Logger:
    """Stands in for the modules ``wandb`` and ``mlflow``, with the signatures that they have."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def init(self, project: str) -> Logger:
        return self

    def log(self, data: dict[str, float], step: int | None = None, commit: bool | None = None) -> None:
        self.logged.append(data)

    def start_run(self) -> nullcontext[None]:
        return nullcontext()


class MLflow(Logger):
    """The module ``mlflow``."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None, synchronous: bool | None = None) -> None:
        self.logged.append(metrics)


def names_for(page: str) -> dict[str, Any]:
    """Return the variables that the examples of a page assume."""
    data = TensorDataset(torch.randn(16, 4), torch.arange(16) % 2)
    loader = DataLoader(data, batch_size=8)
    model: nn.Module = nn.Linear(4, 2)
    extra: dict[str, Any] = {}
    if page == "layouts.md":
        model = nn.Sequential()
        model.add_module("encoder", nn.Linear(4, 4))
        model.add_module("head", nn.Linear(4, 2))
        extra = {"Mixture": Mixture, "weight": torch.randn(8, 3, 5, 5), "groups": 2}
    elif page == "results.md":
        extra = {"make_model": lambda: nn.Linear(4, 2), "train": data, "test": data, "accuracy": accuracy}
    elif page == "scaling.md":  # a stand-in; tests/distributed uses the real class
        extra = {"DistributedDataParallel": lambda net: net, "net": model}
    loss = nn.functional.cross_entropy
    loss(model(data[:][0]), data[:][1]).backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    common = {"torch": torch, "gradcentral": gradcentral, "model": model, "optimizer": optimizer}
    return common | {"loader": loader, "loss": loss} | extra


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_every_python_example_runs(page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loggers = {"wandb": Logger(), "mlflow": MLflow()}
    for name, logger in loggers.items():
        monkeypatch.setitem(sys.modules, name, logger)
    if "SummaryWriter" in code or "runs/gc" in code:
        pytest.importorskip("tensorboard")
    exec(compile(code, str(page), "exec"), names_for(page.name))
    for name, logger in loggers.items():
        assert ("gc/share" in (logger.logged or [{}])[0]) == (f"import {name}" in code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page: Path) -> None:
    text = page.read_text()
    fenced = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    commands = re.findall(r"^(?:gradcentral|make|python) .*", fenced, re.M)
    commands += re.findall(r"`((?:gradcentral|make|python) [^`]+)`", text)
    subcommands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in commands:
        program, name, *rest = command.partition("#")[0].split()
        if program == "make":
            assert {name, *rest} <= {*targets}, command
        elif program == "python":
            assert (ROOT / name).exists(), command
        else:
            options = [option for param in subcommands[name].params for option in (*param.opts, *param.secondary_opts)]
            assert {option for option in rest if option.startswith("-")} <= {*options}, command


INTEGRATIONS = sorted(ROOT.glob("docs/integrations/*.md"))


@pytest.mark.parametrize("page", INTEGRATIONS, ids=lambda page: page.name)
def test_pages_of_integrations_have_the_same_order(page: Path) -> None:
    """What to type, the script, what is particular to the library, the order of clipping, the tests and the limits."""
    first, *_, clipping, tested, limits = re.findall(r"^## (.*)", page.read_text(), re.M)
    assert first == "Script"
    assert clipping.startswith("Clipping")
    assert (tested, limits) == ("What was tested", "Limits")
    assert f"](integrations/{page.name})" in (ROOT / "docs" / "integrations.md").read_text()


@pytest.mark.parametrize("page", [*PAGES, *INTEGRATIONS], ids=lambda page: page.name)
def test_every_link_has_a_target(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("package", ["gradcentral", "gradcentral.diagnostics", "gradcentral.experiment"])
def test_every_public_name_has_an_entry_in_the_reference(package: str) -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    entries = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", reference, re.M))
    assert {*importlib.import_module(package).__all__} <= entries


def test_every_extra_is_declared() -> None:
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    lists = [found for page in PAGES for found in re.findall(r"'(?:\.|gradcentral)\[([\w,]+)\]'", page.read_text())]
    assert {extra for names in lists for extra in names.split(",")} <= {*declared}


def test_every_file_of_the_architecture_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"^([\w.]+(?:/|\.py)) ", text, re.M) + re.findall(r"`([\w./]+(?:/|\.(?:py|c|h)))`", text)
    package = ROOT / "src" / "gradcentral"
    assert [name for name in named if not ((package / name).exists() or (ROOT / name).exists())] == []
