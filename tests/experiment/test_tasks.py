"""The suite of built-in tasks, on synthetic data in the formats of the real files."""

from __future__ import annotations

import gzip
import pickle
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from gradcentral.diagnostics.advice import kinds_of
from gradcentral.experiment import Task, TaskError, load_task
from gradcentral.experiment.data import epochs_of
from gradcentral.experiment.loading import find_task, unpack
from gradcentral.experiment.store import Key
from gradcentral.experiment.tasks import MODULES, SUITE
from gradcentral.experiment.tasks.networks import LoRA, dead_units
from gradcentral.experiment.tasks.optimizers import OPTIMIZERS, PAPER_RATES, Lion, tuned
from gradcentral.experiment.tasks.sources import DATA, FASHION, TEXT
from gradcentral.experiment.training import Settings, Trainer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # where evidence_runs and evidence_analysis are


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 2,048 random images per part, a short text and CIFAR-100 with four images per part."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for name in FASHION:
        images, header = "images" in name, 16 if "images" in name else 8
        size, high = (2048 * 28 * 28, 256) if images else (2048, 10)
        content = torch.randint(high, (size,), generator=generator, dtype=torch.uint8)
        (folder / name).write_bytes(gzip.compress(bytes(header) + content.numpy().tobytes(), 1))
    text = "A notice.\n_The Devil's Dictionary_ was begun" + " in a weekly paper" * 8000
    (folder / TEXT).write_bytes(gzip.compress(text.encode()))
    (folder / "cifar-100-python").mkdir()
    for part in ("train", "test"):
        pixels = torch.randint(256, (4, 3072), generator=generator, dtype=torch.uint8)
        content_of = {b"data": pixels.numpy(), b"fine_labels": [0, 1, 2, 99]}
        (folder / "cifar-100-python" / part).write_bytes(pickle.dumps(content_of))
    return folder


@pytest.fixture
def found(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(DATA, str(data))
    return data


def built_in(name: str) -> Task:
    task = load_task(name)
    assert isinstance(task, Task)
    return task


@pytest.mark.parametrize("name", [*SUITE, "cifar100"])
def test_each_task_trains_with_each_optimizer_and_its_steps_are_centered(found: Path, name: str) -> None:
    task = built_in(name)
    assert task.name == name
    assert {*task.optimizers} == {*OPTIMIZERS}
    rates = PAPER_RATES if name == "cifar100" else tuned(name)
    for optimizer in task.optimizers:
        trainer = Trainer(task, Settings(task.epochs), Key(optimizer, "update", 0))
        assert trainer.arm.handle is not None
        before = [p.detach().clone() for p in trainer.model.parameters()]
        for batch in islice(next(epochs_of(task, 0)), 2):
            assert float(trainer.step(batch, effects=[])) > 0  # checks that the step keeps the means
        changed = [not torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True)]
        assert any(changed)
        assert trainer.optimizer.param_groups[0]["initial_lr"] == rates[optimizer]["lr"]
        if name == "cifar100":  # ResNet-18 is slow on a CPU
            break


@pytest.mark.parametrize("name", SUITE)
def test_the_probe_recognizes_the_kind_of_each_measured_model(found: Path, name: str) -> None:
    from evidence_analysis import KINDS

    assert KINDS[name] in kinds_of(built_in(name).model())


@pytest.mark.parametrize("name", ["tabular-relu", "tabular-sigmoid"])
def test_workers_load_the_task_of_that_name_from_a_file_with_several(name: str) -> None:
    assert unpack(find_task(name).pack(None)).task.name == name


def test_fine_tuning_starts_from_the_same_network_with_a_new_head(found: Path) -> None:
    from gradcentral.experiment.training import fresh_model

    one, two = (fresh_model(built_in("fine-tuning"), seed) for seed in (0, 1))
    weights, other = one.state_dict(), two.state_dict()
    differing = {name for name in weights if not torch.equal(weights[name], other[name])}
    assert differing == {"head.weight", "head.bias"}


def test_lora_trains_only_thin_layers_and_the_head(found: Path) -> None:
    from gradcentral.experiment.training import fresh_model

    model = fresh_model(built_in("lora"), 0)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"down", "up", "head"}
    layers = [module for module in model.modules() if isinstance(module, LoRA)]
    assert len(layers) == 9  # four in each of two blocks, and the patches
    x = torch.rand(2, layers[0].base.in_features)
    assert torch.equal(layers[0](x), layers[0].base(x))  # no change before training


def test_batches_of_cifar_are_shifted_and_flipped_images(found: Path) -> None:
    from gradcentral.experiment.tasks.cifar import AugmentedBatches

    images = torch.arange(1.0, 1 + 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    batches = AugmentedBatches(images, torch.tensor([0, 1]), 2)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        for image, label in zip(*next(iter(batches)), strict=True):
            crops = [padded[label, :, y : y + 8, x : x + 8] for y in range(9) for x in range(9)]
            crops += [crop.flip(2) for crop in crops]
            seen.add(next(i for i, crop in enumerate(crops) if torch.equal(crop, image)))
    assert len(seen) > 40  # of 162 crops, in 80 draws


def test_the_evidence_at_the_papers_scale_is_a_run_of_the_same_kind(found: Path) -> None:
    import evidence_runs

    cells = evidence_runs.grid_of_paper(seeds=10)
    assert len(cells) == 10 * (4 + 3 + 3)
    cell = next(cell for cell in cells if (cell.optimizer, cell.arm) == ("sgd", "gradient"))
    assert (cell.lr, cell.weight_decay) == (0.1, 5e-4)  # the paper's table 1
    task = built_in("cifar100")
    assert task.epochs == 200
    assert task.schedule is not None
    optimizer = task.optimizers["sgd"]([nn.Parameter(torch.zeros(1))])
    schedule = task.schedule(optimizer, 1000)
    rates = []
    for _ in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.1 * 0.1 ** (step // 300) for step in range(1000)]  # every 60 of 200 epochs
    assert rates == pytest.approx(expected)
    record = evidence_runs.run_cell(cell, epochs=1)
    assert record["task"] == "cifar100"
    assert len(record["train_loss"]) == 1
    assert 0 < record["share"] < 1


def test_missing_data_are_named_with_a_remedy(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradcentral.experiment.tasks import sources

    monkeypatch.setenv(DATA, str(tmp_path))
    monkeypatch.setattr(sources, "_DEBIAN", dict.fromkeys((*FASHION, TEXT), ("a-package", tmp_path / "none")))
    with pytest.raises(TaskError, match=f"not found in .*set {DATA} to a folder with the file") as caught:
        load_task("fashion-none")
    assert "a-package" in str(caught.value)
    with pytest.raises(TaskError, match="unpack cifar-100-python.tar.gz"):
        load_task("cifar100")
    variable = re.search(r"set (\w+) to", str(caught.value))
    assert variable is not None
    monkeypatch.setenv(variable[1], str(data))
    assert load_task("fashion-none").name == "fashion-none"


def test_diabetes_is_read_from_a_file_where_scikit_learn_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradcentral.experiment.tasks.sources import DIABETES, diabetes

    monkeypatch.delenv(DATA, raising=False)
    inputs, target = diabetes()
    assert (inputs.shape, target.shape) == ((442, 10), (442, 1))
    table = torch.cat([inputs, target], 1)
    assert torch.allclose(table.mean(0), torch.zeros(11), atol=1e-5)
    assert torch.allclose(table.std(0), torch.ones(11), atol=1e-5)
    (tmp_path / DIABETES).write_text("\n".join(",".join(f"{x:.7g}" for x in row) for row in table.tolist()))
    monkeypatch.setenv(DATA, str(tmp_path))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    again, _ = diabetes()
    assert torch.allclose(again, inputs, atol=1e-5)


def test_lion_follows_its_definition() -> None:
    weights = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([weights], lr=0.1, weight_decay=0.5)
    average, expected = torch.zeros(2), weights.detach().clone()
    for gradient in (torch.tensor([0.3, -0.1]), torch.tensor([-0.4, -0.2])):
        weights.grad = gradient.clone()
        optimizer.step()
        update = (0.9 * average + 0.1 * gradient).sign()
        average = 0.99 * average + 0.01 * gradient
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * update
        assert torch.allclose(weights.detach(), expected)
    with pytest.raises(ValueError, match=r"call backward\(\) before step\(\)"):
        optimizer.step(lambda: None)


def test_dead_units_are_those_that_no_example_activates() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2), nn.ReLU())
    with torch.no_grad():
        for layer, biases in ((model[0], [1.0, -1, -1, 1]), (model[3], [1.0, 1])):
            layer.weight.zero_()  # type: ignore[operator]
            layer.bias.copy_(torch.tensor(biases))  # type: ignore[operator]
    assert dead_units(model, torch.rand(3, 1, 2, 2)) == pytest.approx(2 / 6)
    assert dead_units(nn.Linear(2, 2), torch.rand(3, 2)) is None


def test_every_module_of_a_built_in_task_exists() -> None:
    import gradcentral.experiment.tasks as package

    folder = Path(package.__file__).parent
    assert {name for name in MODULES.values() if not (folder / f"{name}.py").exists()} == set()
