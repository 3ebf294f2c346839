"""The layout command: building models, and its output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from gradcentral.cli.layout import ModelError, build_model


def test_models_are_built_on_the_meta_device() -> None:
    model = build_model("torch.nn:Linear(10**6, 10**6)")
    assert isinstance(model, nn.Linear)
    assert model.weight.is_meta


def test_models_that_read_tensor_values_are_built_without_the_meta_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(int(torch.ones(3).sum().item()), 2)\nready = make()\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("make", "ready", "make()"):
        model = build_model(f"my_models:{name}")
        assert isinstance(model, nn.Linear)
        assert model.in_features == 3


@pytest.mark.parametrize(
    "expression",
    [
        "Sequential(*[Linear(3, 3) for _ in range(2)])",
        "Sequential(*(Linear(3, 3) for _ in range(2)))",
        "Sequential(*{i: Linear(3, 3) for i in range(2)}.values())",
        "Sequential(*map(lambda size: (lambda: Linear(size, size))(), (3, 3)))",
        "lambda: Sequential(*[[Linear(3, size) for size in (3,)][0] for _ in range(2)])",
    ],
)
def test_nested_scopes_of_an_expression_see_the_names_of_the_module(expression: str) -> None:
    model = build_model(f"torch.nn:{expression}")
    assert [layer.weight.shape for layer in model.children()] == [(3, 3), (3, 3)]


@pytest.mark.parametrize(
    "module", ["models/net.py", "models/net", "./models/net.py", "{tmp}/models/net.py", "plain.py"]
)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_the_command_suggested_for_a_path_works(
    module: str, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    for file in ("models/net.py", "plain.py"):
        (tmp_path / file).write_text("import torch\nclass Net(torch.nn.Linear):\n    __init__ = lambda self: None\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    if elsewhere:
        module = str(tmp_path / module.format(tmp=tmp_path))
        monkeypatch.chdir("/")
    for target in (f"{module.format(tmp=tmp_path)}:Net", module.format(tmp=tmp_path)):
        if not target.endswith((".py", "Net")):
            continue
        with pytest.raises(ModelError, match="gradcentral layout") as raised:
            build_model(target)
        found = re.search(r"(?:cd (\S+) && )?gradcentral layout (\S+):(Net|NAME)$", str(raised.value))
        assert found, str(raised.value)
        monkeypatch.chdir(found[1] or ".")
        monkeypatch.setattr(sys, "path", [name for name in sys.path if name != str(tmp_path)])
        for name in ("models", "models.net", "net", "plain"):
            sys.modules.pop(name, None)
        assert type(build_model(f"{found[2]}:Net")).__name__ == "Net"


def test_a_file_that_cannot_be_run_gets_no_suggestion(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import torch\n1 / 0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError") as raised:
        build_model(str(tmp_path / "broken.py"))
    assert "gradcentral layout" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.nn", "write MODULE:NAME"),
        ("no_such_module:Net", "cannot import no_such_module"),
        ("torch.nn:NoSuchLayer", "NameError"),
        ("torch.nn:Linear", "if it needs arguments, write them, as in"),
        ("torch:tensor([1.0])", "is a Tensor, not a torch.nn.Module or"),
        ("no_such_task.py", "no_such_task.py"),
    ],
)
def test_targets_that_cannot_be_built_are_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(target)
    if not target.endswith(".py"):
        with pytest.raises(ModelError):
            build_model(target)


@pytest.mark.parametrize("target", ["torch.nn", "torch.nn:Linear", "custom.py"])
def test_the_example_in_a_refusal_builds_a_model(target: str, tmp_path: Path) -> None:
    (tmp_path / "custom.py").write_text("def task(run):\n    return {}\n")
    with pytest.raises(ModelError, match="as in") as refused:
        build_model(str(tmp_path / target) if target.endswith(".py") else target)
    (example,) = re.findall(r'as in "(.*?)"', str(refused.value))
    assert isinstance(build_model(example), nn.Module)


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradcentral", "layout", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_prints_a_table_or_json() -> None:
    pytest.importorskip("typer", reason="the command line needs typer: pip install 'gradcentral[experiments]'")
    shown = _command("torch.nn:Transformer(8, 2, 1, 1, 8)")
    assert shown.returncode == 0
    assert "MultiheadAttention.in_proj_weight" in shown.stdout
    report = json.loads(_command("torch.nn:Linear(9, 2)", "--json").stdout)
    assert report["totals"]["elements"] == 20
    assert "not a convolution" in _command("torch.nn:Linear(9, 2)", "--only", "conv").stdout
    failed = _command("torch.nn:Linear")
    assert failed.returncode == 2
    assert failed.stderr.startswith("gradcentral: torch.nn:Linear: TypeError")


def test_what_a_model_prints_goes_to_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer", reason="the command line needs typer: pip install 'gradcentral[experiments]'")
    (tmp_path / "noisy.py").write_text(
        "import torch\nprint('on import')\ndef make():\n    print('building')\n    return torch.nn.Linear(3, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    shown = _command("noisy:make", "--json")
    assert json.loads(shown.stdout)["totals"]["elements"] == 8
    assert shown.stderr.split() == ["on", "import", "building"]


def test_the_command_takes_a_task_file() -> None:
    pytest.importorskip("typer", reason="the command line needs typer: pip install 'gradcentral[experiments]'")
    shown = _command(str(Path(__file__).parent / "data" / "layout_task.py"))
    assert shown.returncode == 0, shown.stderr
    assert "2 of 4 parameters are centered" in shown.stdout
