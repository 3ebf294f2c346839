"""Validation and loading of tasks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from gradcentral.experiment import CustomTask, Task, TaskError, load_task


class Stream(IterableDataset[Any]):
    """A dataset without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "", "name: '' cannot name a folder"),
        ("name", "a/b", "name: 'a/b' cannot name a folder"),
        ("model", nn.Linear(1, 1), "model: give a function that builds a fresh model"),
        ("model", 3, "model: give a function"),
        ("loss", "mse", "loss: give a function"),
        ("metric", None, "metric: give a function"),
        ("train", Stream(), "train: Stream is an IterableDataset, which gives no example by its index"),
        ("test", TensorDataset(torch.empty(0), torch.empty(0)), "test: the dataset is empty"),
        ("optimizers", {}, "optimizers: give at least one"),
        ("optimizers", {"a,b": torch.optim.SGD}, "optimizers: 'a,b' is not a name"),
        ("optimizers", {"sgd": torch.optim.SGD([torch.ones(1)])}, "optimizers['sgd']: give a function"),
        ("batch_size", 0, "batch_size: give an integer of at least 1, not 0"),
        ("epochs", 2.5, "epochs: give an integer of at least 1, not 2.5"),
        ("schedule", 1, "schedule: give a function"),
        ("higher_is_better", "yes", "higher_is_better: give True or False"),
    ],
)
def test_an_unusable_field_is_named(tiny: Callable[..., Task], field: str, value: Any, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        tiny(**{field: value})
    assert message in str(caught.value)


def test_the_metric_is_named_after_the_wrapped_function_or_the_class(tiny: Callable[..., Task]) -> None:
    class Score:
        def __call__(self, output: object, target: object) -> float:
            return 0.0

    assert tiny(metric=functools.partial(nn.functional.l1_loss, reduction="mean")).metric_name == "l1_loss"
    assert tiny(metric=Score()).metric_name == "Score"


@pytest.mark.parametrize(
    ("name", "classes"), [("digits", 10), ("digits-batchnorm", 10), ("digits-vit", 10), ("wine", 3)]
)
def test_a_built_in_task_loads_and_its_model_runs(name: str, classes: int) -> None:
    task = load_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert set(task.optimizers) == {"sgd", "adam" if name == "wine" else "adamw"}
    example, label = task.train[0]
    assert task.model()(example[None]).shape == (1, classes)
    assert 0 <= label < classes


def test_the_digits_are_split_without_overlap_and_include_every_digit() -> None:
    task = load_task("digits")
    assert isinstance(task, Task)
    assert isinstance(task.train, TensorDataset)
    assert isinstance(task.test, TensorDataset)
    train, test = ({row.numpy().tobytes() for row in part.tensors[0]} for part in (task.train, task.test))
    assert len(task.train) == 896
    assert len(task.test) == 901
    assert not train & test
    assert all(part.tensors[1].bincount().min() > 60 for part in (task.train, task.test))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = (\n", "line 1"),
        ("\n\nopen('no_such_dataset.csv')\n", "line 3: FileNotFoundError"),
        ("def f():\n    raise ValueError('two\\nlines')\n\nf()\n", "line 2: ValueError: two lines"),
        ("import no_such_module_at_all\n", "line 1: ModuleNotFoundError"),
        ("x = 1\n", "does not define `task`"),
        ("task = 3\n", "`task` is of type int"),
        ("from gradcentral.experiment import CustomTask\ntask = CustomTask('', print)\n", "line 2: name: ''"),
    ],
)
def test_the_error_of_an_unusable_file_is_one_line_with_the_location(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(content)
    with pytest.raises(TaskError) as caught:
        load_task(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_task_is_named_with_the_existing_ones(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="unknown task 'digit'; choose from digits, .*wine.*, or give a Python file"):
        load_task("digit")
    with pytest.raises(TaskError, match=r"none\.py: the file does not exist"):
        load_task(tmp_path / "none.py")
    with pytest.raises(TaskError, match="cannot be read"):
        load_task(tmp_path)


def test_a_file_may_import_modules_beside_it_and_define_a_bare_function(tmp_path: Path) -> None:
    (tmp_path / "beside_my_task.py").write_text("LOSS = 0.25\n")
    path = tmp_path / "trainer.py"
    path.write_text(
        "def task(seed, arm):\n    import beside_my_task\n"
        "    yield {'train_loss': beside_my_task.LOSS, 'test_metric': 1}\n"
    )
    task = load_task(path)
    assert isinstance(task, CustomTask)
    assert task.name == "trainer"
    assert next(iter(task.run(0, "none")))["train_loss"] == 0.25


def test_the_remedies_in_messages_work(tiny: Callable[..., Task], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="for example model=") as caught:
        tiny(model=nn.Linear(6, 2))
    tiny(model=eval(_suggestion(caught, r"model=(.*)").replace("...", "6, 2"), {"Linear": nn.Linear}))
    for optimizers in ({}, {"sgd": torch.optim.SGD([torch.ones(1)])}):
        with pytest.raises(TaskError, match="lambda params: ") as caught:
            tiny(optimizers=optimizers)
        factory = eval(_suggestion(caught, r"(lambda params: [^}]*)").replace("...", "lr=0.1"), {"torch": torch})
        assert isinstance(
            tiny(optimizers={"sgd": factory}).optimizers["sgd"]([nn.Parameter(torch.ones(1))]), torch.optim.SGD
        )
    with pytest.raises(TaskError, match="give a Dataset of") as caught:
        tiny(train=3)
    inputs = torch.ones(8, 6)
    made = eval(
        _suggestion(caught, r"such as (.*), or"), {"TensorDataset": TensorDataset, "inputs": inputs, "targets": inputs}
    )
    assert tiny(train=made).train is made
    path = tmp_path / "empty.py"
    path.write_text("from gradcentral.experiment import *\n")
    with pytest.raises(TaskError, match="end it with task = Task") as caught:
        load_task(path)
    fields = "name='x', model=print, train=[1], test=[1], loss=print, metric=print, optimizers={'sgd': print}"
    path.write_text(path.read_text() + _suggestion(caught, r"end it with (.*)").replace("...", fields))
    assert load_task(path).name == "x"


def _suggestion(caught: pytest.ExceptionInfo[TaskError], pattern: str) -> str:
    found = re.search(pattern, str(caught.value))
    assert found is not None
    return found.group(1)
