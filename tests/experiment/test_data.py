"""The data of a task: datasets and loaders, batches of every form, and what is refused."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

import gradcentral
from gradcentral.experiment import Task, TaskError
from gradcentral.experiment import compare as compare_loudly
from gradcentral.experiment.data import epochs_of, steps_of
from gradcentral.experiment.probing import probe_task

compare = functools.partial(compare_loudly, progress=False, seeds=2, jobs=1, arms=["none", "gradient"])


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcentral.experiment.run_comparison.write_report", lambda comparison: None)


def examples(count: int) -> TensorDataset:
    x = torch.rand(count, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :2])


class Stream(IterableDataset[Any]):
    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("no length")
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter(examples(self.length or 10))


class Claims(Dataset[Any]):
    """A dataset that claims more examples than any memory can order."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.rand(6), torch.rand(2)


class Batched:
    """Batches without an index, as other libraries' loaders give them."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter([*DataLoader(examples(30), 10)])


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_gives_paired_runs(tiny: Callable[..., Task], tmp_path: Path, shuffle: bool) -> None:
    loader = DataLoader(examples(30), 8, shuffle=shuffle)
    task = tiny(train=loader, test=DataLoader(examples(12), 5), batch_size=32)
    result = compare(task, epochs=3, out=tmp_path)
    seeds = [{tuple(epoch["data"] for epoch in run.epochs) for run in result.all_runs if run.seed == s} for s in (0, 1)]
    assert [len(batches) for batches in seeds] == [1, 1]
    orders = {data for batches in seeds for data in next(iter(batches))}
    assert len(orders) == (2 * 3 if shuffle else 1)
    assert result.probe is not None
    assert all(run.train_metric is not None for run in result.all_runs)
    again = compare(task, epochs=3, out=tmp_path / "again")
    assert [run.epochs for run in again.all_runs] == [run.epochs for run in result.all_runs]


def test_a_loader_with_a_generator_of_its_own_gives_paired_runs(tiny: Callable[..., Task], tmp_path: Path) -> None:
    loader = DataLoader(examples(30), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    result = compare(tiny(train=loader), out=tmp_path)
    assert len({run.epochs[0]["data"] for run in result.all_runs}) == 2


class Noisy(Dataset[Any]):
    """Examples with random augmentation."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return examples(32)[index][0] + torch.randn(6) + random.random(), torch.ones(2)


@pytest.mark.parametrize("jobs", [1, 2])
def test_workers_of_a_loader_draw_the_same_numbers_in_every_run(
    tiny: Callable[..., Task], tmp_path: Path, jobs: int
) -> None:
    loader = DataLoader(Noisy(), 16, shuffle=True, num_workers=1, persistent_workers=True)
    task = tiny(train=loader, test=examples(20))
    compare(task, out=tmp_path, jobs=jobs, arms=["none", "update"])
    runs = compare(task, out=tmp_path, jobs=jobs).all_runs  # the loader, read before, has the same fingerprint
    assert runs[0].epochs[0]["data"] == runs[1].epochs[0]["data"] != runs[0].epochs[1]["data"]


def test_the_sampler_of_a_batch_sampler_is_seeded(tiny: Callable[..., Task], tmp_path: Path) -> None:
    data = examples(32)
    sampler = BatchSampler(RandomSampler(data, generator=torch.Generator().manual_seed(3)), 16, drop_last=False)
    runs = compare(tiny(train=DataLoader(data, batch_sampler=sampler), test=examples(20)), out=tmp_path).all_runs
    assert runs[0].epochs[0]["data"] == runs[1].epochs[0]["data"]


def test_a_loader_is_sent_to_workers(tiny: Callable[..., Task], tmp_path: Path) -> None:
    loader = DataLoader(examples(30), 8, shuffle=True, generator=torch.Generator())
    here, there = (compare(tiny(train=loader), jobs=jobs, out=tmp_path / str(jobs)) for jobs in (1, 2))
    assert [run.epochs for run in here.all_runs] == [run.epochs for run in there.all_runs]


def test_a_loader_and_a_dataset_train_alike(tiny: Callable[..., Task], tmp_path: Path) -> None:
    """One batch per epoch holds all examples, so that the order does not matter."""
    one, other = (
        compare(tiny(train=train, batch_size=30, model=lambda: nn.Linear(6, 2)), out=tmp_path / name).all_runs
        for name, train in (("dataset", examples(30)), ("loader", DataLoader(examples(30), 30)))
    )
    for first, second in zip(one, other, strict=True):
        assert first.final("test_metric") == pytest.approx(second.final("test_metric"), rel=1e-5)
        assert first.final("train_loss") == pytest.approx(second.final("train_loss"), rel=1e-5)


def test_batches_without_an_index_and_streams_in_a_loader_are_read(tiny: Callable[..., Task], tmp_path: Path) -> None:
    for train in (Batched(), DataLoader(Stream(30), 10)):
        task = tiny(train=train)
        assert steps_of(task, 2) == 6
        assert len([*next(epochs_of(task, 0))]) == 3
    assert len(compare(task, out=tmp_path).all_runs) == 4


def test_a_loader_that_is_exhausted_is_refused(tiny: Callable[..., Task], tmp_path: Path) -> None:
    class Once(Batched):
        def __init__(self) -> None:
            self.left = [*DataLoader(examples(30), 10)]

        def __iter__(self) -> Iterator[Any]:
            while self.left:
                yield self.left.pop()

    with pytest.raises(
        TaskError, match="train and test: a Once gave no batch; it must give all of its batches in every epoch"
    ):
        compare(tiny(train=Once()), out=tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train", Stream(10), "train: Stream is an IterableDataset"),
        ("test", Stream(), "test: Stream is an IterableDataset"),
        ("train", DataLoader(Stream()), "train: the length of the DataLoader is unknown (TypeError"),
        ("train", iter([1]), "train: a list_iterator can be read only once; give a Dataset or a DataLoader"),
        ("train", 3, "train: a int has no length and index"),
        ("train", Claims(10**10), "train: the Claims has 10,000,000,000 examples, more than"),
        ("test", Claims(10**10), "test: the Claims has 10,000,000,000 examples, more than"),
        ("train", Claims(10**20), "train: the length of the Claims is unknown (OverflowError"),
        ("test", [], "test: the dataset is empty"),
        ("collate", 3, "collate: give a function"),
        ("drop_last", 1, "drop_last: give True or False, not 1"),
        ("metric_per_batch", None, "metric_per_batch: give True or False, not None"),
    ],
)
def test_unusable_data_are_refused_and_named(tiny: Callable[..., Task], field: str, value: Any, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        tiny(**{field: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_a_loader_would_ignore_are_refused(tiny: Callable[..., Task]) -> None:
    loaders = {"train": DataLoader(examples(9)), "test": DataLoader(examples(9))}
    tiny(**loaders, batch_size=32)
    options: dict[str, Any] = {"batch_size": 4, "collate": torch.utils.data.default_collate, "drop_last": True}
    for name, value in options.items():
        with pytest.raises(TaskError, match=f"{name}: has no effect on the batches of a DataLoader; pass ") as caught:
            tiny(**{"batch_size": 32, name: value} | loaders)
        option = _after("pass ", caught).partition("=")[0]
        loader = DataLoader(examples(9), **{option: value})
        tiny(train=loader, test=loader, batch_size=32)


def test_the_remedies_for_data_work(tiny: Callable[..., Task]) -> None:
    names = {"DataLoader": DataLoader, "torch": torch}
    with pytest.raises(TaskError, match="give a loader of it: train=(.*)") as caught:
        tiny(train=Stream(30))
    tiny(train=eval(_after("train=", caught), names | {"dataset": Stream(30)}))
    with pytest.raises(TaskError, match="use some of them: train=(.*)") as caught:
        tiny(train=Claims(10**10))
    subset = eval(_after("train=", caught), names | {"dataset": Claims(10**10)})
    assert isinstance(subset, Subset)
    assert len(tiny(train=subset).train) == 1_000_000
    with pytest.raises(TaskError, match="lower batch_size"):
        tiny(train=examples(9), batch_size=10, drop_last=True)
    tiny(train=examples(9), batch_size=9, drop_last=True)


def _after(words: str, caught: pytest.ExceptionInfo[TaskError]) -> str:
    return str(caught.value).rpartition(words)[2]


# Forms of batches.


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.first(one) + self.second(other)
        return output


def test_a_model_may_have_several_inputs(tiny: Callable[..., Task], tmp_path: Path) -> None:
    x = examples(30).tensors[0]
    data = TensorDataset(x[:, :2], x[:, 2:], x[:, :2])
    task = tiny(model=TwoInputs, train=data, test=data)
    result = compare(task, out=tmp_path)
    assert all(run.diverged_at is None for run in result.all_runs)
    assert len(probe_task(task).centered) == 2
    assert len(gradcentral.probe(TwoInputs(), task.loss, DataLoader(data, 5)).centered) == 2


def test_collate_makes_batches_of_any_examples(tiny: Callable[..., Task], tmp_path: Path) -> None:
    data = [{"file": f"{i}.png", "pixels": [i / 30] * 6, "label": "ab"[i % 2]} for i in range(30)]

    def collate(batch: list[Any]) -> tuple[torch.Tensor, list[str]]:
        return torch.tensor([example["pixels"] for example in batch]), [example["label"] for example in batch]

    def classes(labels: list[str]) -> torch.Tensor:
        return torch.tensor(["ab".index(label) for label in labels])

    seen = []

    def accuracy(output: torch.Tensor, labels: list[str]) -> float:
        seen.append(labels)
        return float((output.argmax(-1) == classes(labels)).float().mean())

    def loss(output: torch.Tensor, labels: list[str]) -> torch.Tensor:
        return nn.functional.cross_entropy(output, classes(labels))

    task = tiny(train=data, test=data, collate=collate, loss=loss, metric=accuracy, batch_size=2)
    compare(task, out=tmp_path)
    assert seen[-1] == [example["label"] for example in data]
    with pytest.raises(TaskError, match="a batch must be a tuple .* collate=lambda examples: ... can make one"):
        compare(tiny(train=[torch.rand(6)] * 4), out=tmp_path / "refused")


def test_targets_may_be_text(tiny: Callable[..., Task], tmp_path: Path) -> None:
    data = [(torch.rand(6), "ab"[i % 2]) for i in range(30)]

    def loss(output: torch.Tensor, target: list[str]) -> torch.Tensor:
        return nn.functional.cross_entropy(output, torch.tensor(["ab".index(label) for label in target]))

    result = compare(tiny(train=data, test=data, loss=loss, metric=loss, batch_size=4), out=tmp_path)
    assert all(run.final("test_metric") == pytest.approx(run.final("test_loss")) for run in result.all_runs)


@pytest.mark.parametrize("empty", [{}, [], ()])
def test_empty_examples_are_refused(tiny: Callable[..., Task], tmp_path: Path, empty: Any) -> None:
    with pytest.raises(TaskError) as caught:
        compare(tiny(train=[empty] * 4), out=tmp_path)
    assert "\n" not in str(caught.value)


# Batches of one.


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("loader", [True, False])
def test_a_last_batch_of_one_is_refused_if_the_model_needs_more(
    tiny: Callable[..., Task], tmp_path: Path, loader: bool
) -> None:
    train = DataLoader(examples(33), 16) if loader else examples(33)
    with pytest.raises(TaskError, match="train: the last batch .* single example.*set drop_last=True") as caught:
        compare(tiny(model=batchnorm, train=train), out=tmp_path / "out")
    option = re.findall(r"set (drop_last=True)$", str(caught.value))[0]
    assert not (tmp_path / "out").exists()
    task = eval(
        f"tiny(model=batchnorm, train=DataLoader(examples(33), 16, {option}))"
        if loader
        else f"tiny(model=batchnorm, train=examples(33), {option})",
        {"tiny": tiny, "batchnorm": batchnorm, "examples": examples, "DataLoader": DataLoader},
    )
    assert steps_of(task, 3) == 6
    assert [len(batch[0]) for batch in next(epochs_of(task, 0))] == [16, 16]
    assert len(compare(task, out=tmp_path / "out").all_runs) == 4


def test_a_sampler_that_leaves_no_single_example_is_accepted(tiny: Callable[..., Task], tmp_path: Path) -> None:
    loader = DataLoader(examples(33), 16, sampler=SubsetRandomSampler(range(32)))
    assert len(compare(tiny(model=batchnorm, train=loader), out=tmp_path).all_runs) == 4


def test_a_last_batch_of_one_is_accepted_without_batchnorm(tiny: Callable[..., Task], tmp_path: Path) -> None:
    assert len(compare(tiny(train=examples(33)), out=tmp_path).all_runs) == 4


def test_the_fingerprint_of_random_augmentation_is_repeatable(tiny: Callable[..., Task], tmp_path: Path) -> None:
    class Augmented(Claims):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(6), torch.ones(2) * index

    task = tiny(train=Augmented(30))
    first = compare(task, out=tmp_path)
    torch.rand(5)
    assert compare(task, out=tmp_path).fingerprint == first.fingerprint
