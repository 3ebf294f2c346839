"""MMEngine: training by a Runner equals a loop in which the gradients are clipped and centered by hand."""

from __future__ import annotations

import doctest
import importlib
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import gradcentral
from tests.integrations.hand_written import center_by_hand, difference, largest_mean, values_of, weights_of
from tests.integrations.pages import run_page

pytest.importorskip("mmengine", reason="needs mmengine: run `make trainers`")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing mmengine compiles functions of torch with torch.jit.script
    mmengine: Any = importlib.import_module("mmengine.runner")
    optim: Any = importlib.import_module("mmengine.optim")
    BaseModel: Any = importlib.import_module("mmengine.model").BaseModel
adapter: Any = importlib.import_module("gradcentral.integrations.mmengine")

_numbers = itertools.count()
HOOK = "gradcentral.integrations.mmengine.GradientCentralization"
DATA: Any = list(
    zip(
        torch.rand(32, 1, 5, 5, generator=torch.Generator().manual_seed(1)),
        torch.randint(3, (32,), generator=torch.Generator().manual_seed(2)),
        strict=True,
    )
)


class _Model(BaseModel):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, 3))

    def forward(self, inputs: Tensor, labels: Tensor, mode: str) -> dict[str, Tensor]:
        assert mode == "loss"
        return {"loss": cross_entropy(self.net(inputs), labels)}


def _loader() -> DataLoader[Any]:
    return DataLoader(DATA, batch_size=4)


def _run(folder: Path, wrapper: Any, model: Any = None, epochs: int = 1, **options: Any) -> Any:
    """Train by a Runner of MMEngine, and return it."""
    runner = mmengine.Runner(
        model=model or _Model(),
        work_dir=str(folder),
        train_dataloader=_loader(),
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper=wrapper,
        experiment_name=f"run{next(_numbers)}",  # MMEngine warns if a name is used twice in a process
        log_level="ERROR",
        **options,
    )
    runner.train()
    return runner


def _by_hand(optimizer: Callable[..., Any], accumulate: int = 1, clip: float | None = None) -> list[Tensor]:
    model = _Model()
    created = optimizer(model.parameters())
    for number, (images, labels) in enumerate(_loader(), start=1):
        (cross_entropy(model.net(images), labels) / accumulate).backward()
        if number % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            center_by_hand(model)
            created.step()
            created.zero_grad()
    return values_of(model)


ADAGRAD = {"type": "Adagrad", "lr": 0.01}


def test_the_hook_clips_first_and_centers_second(tmp_path: Path) -> None:
    wrapper = {"optimizer": ADAGRAD, "clip_grad": {"max_norm": 0.5}, "accumulative_counts": 2}
    trained = values_of(_run(tmp_path / "gc", wrapper, custom_hooks=[{"type": HOOK}]).model)
    expected = _by_hand(lambda params: torch.optim.Adagrad(params, lr=0.01), accumulate=2, clip=0.5)
    assert difference(trained, expected) < 1e-6
    assert difference(trained, values_of(_run(tmp_path / "plain", wrapper).model)) > 1e-3


def test_gradcentral_optimizers_by_their_names(tmp_path: Path) -> None:
    wrapper = {"optimizer": {"type": "gradcentral.AdamW", "lr": 0.01, "weight_decay": 0.1}}
    trained = values_of(_run(tmp_path / "gc", wrapper).model)
    assert difference(trained, _by_hand(lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1))) < 1e-6


def test_groups_of_single_parameters_keep_their_options() -> None:
    options = {"bias_decay_mult": 0.0, "custom_keys": {"net.0": {"lr_mult": 0.1}, "net.3": {"centralize": False}}}
    model: Any = _Model()
    created = optim.build_optim_wrapper(
        model, {"optimizer": {"type": "gradcentral.SGD", "lr": 0.1, "weight_decay": 0.5}, "paramwise_cfg": options}
    ).optimizer
    assert [group["lr"] for group in created.param_groups] == pytest.approx([0.01, 0.01, 0.1, 0.1])
    cross_entropy(model.net(DATA[0][0][None]), DATA[0][1][None]).backward()
    start = values_of(model)
    created.step()
    layer = model.net[0]
    centered = layer.weight.grad - layer.weight.grad.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(layer.weight, start[0] - 0.01 * (centered + 0.5 * start[0]), atol=1e-7)
    head = model.net[3]
    assert torch.allclose(head.weight, start[2] - 0.1 * (head.weight.grad + 0.5 * start[2]), atol=1e-7)


def test_settings_of_the_hook(tmp_path: Path) -> None:
    hook = {"type": HOOK, "placement": "update", "strength": 0.5, "exclude": ["net.3.*"]}
    start = values_of(_Model())
    wrapper = {"optimizer": {**ADAGRAD, "weight_decay": 0.1}}
    runner = _run(tmp_path / "half", wrapper, custom_hooks=[hook])
    handle = next(one.handle for one in runner.hooks if isinstance(one, adapter.GradientCentralization))
    assert handle.strength == 0.5
    assert "net.3.weight" in handle.layout.skipped
    assert not gradcentral.attached(runner.optim_wrapper.optimizer)  # detached after training
    runner = _run(tmp_path / "whole", wrapper, custom_hooks=[{"type": HOOK, "placement": "update"}])
    changes = [w.detach() - start[i] for w, i in zip(weights_of(runner.model), (0, 2), strict=True)]
    assert largest_mean(changes) < 1e-5
    plain = _run(tmp_path / "plain", wrapper)
    changes = [w.detach() - start[i] for w, i in zip(weights_of(plain.model), (0, 2), strict=True)]
    assert largest_mean(changes) > 1e-2


def test_what_the_user_has_attached_stays(tmp_path: Path) -> None:
    model = _Model()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    handle = gradcentral.centralize(optimizer, model)
    _run(tmp_path, optim.OptimWrapper(optimizer), model, custom_hooks=[{"type": HOOK}])
    assert gradcentral.attached(optimizer) == [handle]
    assert difference(values_of(model), _by_hand(lambda params: torch.optim.Adagrad(params, lr=0.01))) < 1e-6


def test_training_again_after_an_exception(tmp_path: Path) -> None:
    model = _Model()
    wrapper, hook = (
        optim.OptimWrapper(torch.optim.Adagrad(model.parameters(), lr=0.01)),
        adapter.GradientCentralization(),
    )

    class Interrupt(adapter.Hook):  # type: ignore[misc]
        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "interrupted", wrapper, model, custom_hooks=[hook, Interrupt()])
    _run(tmp_path / "again", wrapper, model, custom_hooks=[hook])
    assert gradcentral.attached(wrapper.optimizer) == []
    assert difference(values_of(model), _by_hand(lambda params: torch.optim.Adagrad(params, lr=0.01))) < 1e-6


def test_names_are_the_same_with_several_processes(tmp_path: Path) -> None:
    """MMEngine wraps the model, which puts "module." in front of the names."""
    wrapped: Any = importlib.import_module("mmengine.model").MMDistributedDataParallel
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = wrapped(module=_Model())
        hook = {"type": HOOK, "placement": "update", "exclude": ["net.3.*"]}
        _run(tmp_path / "run", {"optimizer": ADAGRAD}, model, custom_hooks=[hook])
    finally:
        torch.distributed.destroy_process_group()
    convolution, linear = (
        w.detach() - w0 for w, w0 in zip(weights_of(model.module), weights_of(_Model()), strict=True)
    )
    assert largest_mean([convolution]) < 1e-5
    assert largest_mean([linear]) > 1e-3


def test_several_optimizers_of_one_model(tmp_path: Path) -> None:
    class Parts(_Model):
        def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
            loss = self(*data, mode="loss")["loss"]
            loss.backward()
            for wrapper in optim_wrapper.values():
                wrapper.step()
                wrapper.zero_grad()
            return {"loss": loss}

    model = Parts()
    start = [w.detach().clone() for w in weights_of(model)]
    parts = {"features": model.net[0], "head": model.net[3]}
    optimizers = {name: torch.optim.Adagrad(part.parameters(), lr=0.01) for name, part in parts.items()}
    wrapper = optim.OptimWrapperDict(**{name: optim.OptimWrapper(one) for name, one in optimizers.items()})
    _run(tmp_path, wrapper, model, custom_hooks=[{"type": HOOK, "placement": "update"}])
    changes = [w.detach() - before for w, before in zip(weights_of(model), start, strict=True)]
    assert largest_mean(changes) < 1e-5


def test_a_wrapper_without_a_runner() -> None:
    model = _Model()
    wrapper = optim.OptimWrapper(torch.optim.Adagrad(model.parameters(), lr=0.01), clip_grad={"max_norm": 0.5})
    assert gradcentral.centralize(wrapper, model) is gradcentral.attached(wrapper.optimizer)[0]
    for images, labels in _loader():
        wrapper.update_params(cross_entropy(model.net(images), labels))
    expected = _by_hand(lambda params: torch.optim.Adagrad(params, lr=0.01), clip=0.5)
    assert difference(values_of(model), expected) < 1e-6


# MMEngine 0.10.7 calls torch.load without weights_only=False, which its checkpoints need since torch 2.6.
@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD:UserWarning")
@pytest.mark.parametrize("optimizer", [ADAGRAD, {"type": "gradcentral.AdamW", "lr": 0.01, "placement": "update"}])
def test_a_resumed_run_equals_an_uninterrupted_one(
    optimizer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    custom = [{"type": HOOK, "placement": "update"}] if optimizer is ADAGRAD else []
    start = [w.detach().clone() for w in weights_of(_Model())]

    def run(folder: str, epochs: int, resume: bool = False) -> list[Tensor]:
        hooks = {"checkpoint": {"type": "CheckpointHook", "interval": 1}}
        options = {"default_hooks": hooks, "custom_hooks": custom, "resume": resume}
        model = _run(tmp_path / folder, {"optimizer": optimizer}, epochs=epochs, **options).model
        assert largest_mean(w.detach() - w0 for w, w0 in zip(weights_of(model), start, strict=True)) < 1e-5
        return values_of(model)

    run("interrupted", 1)
    assert difference(run("interrupted", 2, resume=True), run("whole", 2)) == 0


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown placement 'updates'"):
        adapter.GradientCentralization("updates")
    with pytest.raises(ValueError, match="strength"):
        adapter.GradientCentralization(strength=2.0)
    wrapper = {"optimizer": {"type": "gradcentral.SGD", "lr": 0.1}}
    with pytest.raises(ValueError, match="already centers: pass placement= when you create it"):
        _run(tmp_path, wrapper, custom_hooks=[{"type": HOOK}])


def test_doctest_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctest.testmod(adapter) == (0, 2)
    monkeypatch.chdir(tmp_path)
    names = run_page("mmengine")
    assert largest_mean(names["changes"]) < 1e-4
