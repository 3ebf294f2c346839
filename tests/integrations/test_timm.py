"""timm: the registered optimizers equal training in which the gradients are centered by hand."""

from __future__ import annotations

import argparse
import copy
import doctest
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradcentral
from tests.integrations.hand_written import center_by_hand, difference, largest_mean, values_of, weights_of
from tests.integrations.pages import run_page

timm: Any = pytest.importorskip("timm", reason="needs timm: run `make trainers`")
pytest.importorskip("timm.scheduler")
adapter: Any = importlib.import_module("gradcentral.integrations.timm")

create = timm.optim.create_optimizer_v2
IMAGES = torch.randn(8, 1, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 3
# apex and bitsandbytes need a CUDA device; Kron takes ten seconds to start.
NAMES = timm.optim.list_optimizers(exclude_filters=["gc*", "fused*", "bnb*", "kron*"])


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, 3)).double()


def _vit() -> Any:
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **options).double()


def _train(model: nn.Module, optimizer: Any, images: Tensor, steps: int = 2, by_hand: bool = False) -> list[Tensor]:
    torch.manual_seed(2)  # some optimizers draw random numbers
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), LABELS)
        loss.backward(create_graph=getattr(optimizer, "is_second_order", False))
        if by_hand:
            center_by_hand(model)
        optimizer.step()
    return values_of(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_equals_centering_by_hand(name: str) -> None:
    def train(name: str, by_hand: bool = False) -> list[Tensor]:
        model = _net()
        return _train(model, create(model, opt=name, lr=0.01, weight_decay=0.05), IMAGES, by_hand=by_hand)

    centered = train(f"gc{name}")
    assert difference(centered, train(name, by_hand=True)) < 1e-9
    assert difference(centered, train(name)) > 1e-6


@pytest.mark.parametrize(("name", "of_timm"), [("gcadamw", "adamw"), ("gcsgd", "sgd"), ("gclamb", "lamb")])
def test_weight_decay_groups_and_layer_decay_are_those_of_timm(name: str, of_timm: str) -> None:
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    options = {"lr": 0.01, "weight_decay": 0.05, "layer_decay": 0.7}
    model, reference = _vit(), _vit()
    optimizer, expected = create(model, opt=name, **options), create(reference, opt=of_timm, **options)
    keys = ("lr", "weight_decay", "lr_scale", "param_names")
    groups = [[{key: group.get(key) for key in keys} for group in o.param_groups] for o in (optimizer, expected)]
    assert groups[0] == groups[1]
    assert len(groups[0]) > 2
    trained = _train(model, optimizer, images, steps=3)
    assert difference(trained, _train(reference, expected, images, steps=3, by_hand=True)) < 1e-12


@pytest.mark.parametrize("name", ["gcmomentum", "gclion"])
def test_the_layout_is_that_of_the_model(name: str) -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(9, 4), "up": nn.ConvTranspose1d(4, 2, 3)})
    optimizer = create(model, opt=name, lr=0.1)
    layout = getattr(optimizer, "layout", None) or gradcentral.attached(optimizer)[0].layout
    assert set(layout.skipped) == {"embed.weight", "up.bias"}
    before = values_of(model)
    model["up"](model["embed"](torch.arange(9)).mT[None]).square().sum().backward()
    optimizer.step()
    change = model["up"].weight.detach() - before[1]
    gradient = model["up"].weight.grad
    assert isinstance(gradient, Tensor)
    if name == "gcmomentum":
        centered = gradient - gradient.mean((0, 2), keepdim=True)
        assert torch.allclose(change, -0.1 * centered, atol=1e-6)
    else:
        assert gradient.mean((0, 2)).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("name", ["gcsgd", "gcadan", "lookahead_gcadamw"])
def test_placement_and_strength_are_passed_on(name: str) -> None:
    model = _net()
    start = values_of(model)
    optimizer = create(model, opt=name, lr=0.01, weight_decay=0.05, placement="update")
    _train(model, optimizer, IMAGES, steps=7)  # Lookahead averages after six steps
    assert largest_mean(w - start[i] for w, i in zip(weights_of(model), (0, 2), strict=True)) < 1e-12
    off, plain = _net(), _net()
    unchanged = _train(off, create(off, opt=name, lr=0.01, strength=0.0), IMAGES)
    assert difference(unchanged, _train(plain, create(plain, opt=name.replace("gc", ""), lr=0.01), IMAGES)) < 1e-12


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("gc_sgd", "gcsgd"),
        ("gc_adamw", "gcadamw"),
        ("GC_Adan", "gcadan"),
        ("gc_lookahead_adamw", "lookahead_gcadamw"),
        ("lookahead_gc_adamw", "lookahead_gcadamw"),
    ],
)
def test_a_separate_prefix_is_not_dropped(name: str, same: str) -> None:
    model, other = _net(), _net()
    optimizer, expected = create(model, opt=name, lr=0.01), create(other, opt=same, lr=0.01)
    assert type(optimizer) is type(expected)
    trained = _train(model, optimizer, IMAGES, steps=6)
    assert difference(trained, _train(other, expected, IMAGES, steps=6)) == 0
    plain = _net()
    name_of_timm = same.replace("gc", "")
    assert difference(trained, _train(plain, create(plain, opt=name_of_timm, lr=0.01), IMAGES, steps=6)) > 1e-5


@pytest.mark.parametrize("inner", [True, False])
def test_attaching_to_lookahead_or_to_the_optimizer_inside(inner: bool) -> None:
    model, other = _net(), _net()
    optimizer = create(model, opt="lookahead_adan", lr=0.01)
    gradcentral.centralize(optimizer._base_optimizer if inner else optimizer, model)
    trained = _train(model, optimizer, IMAGES, steps=7)
    expected = _train(other, create(other, opt="lookahead_gcadan", lr=0.01), IMAGES, steps=7)
    assert difference(trained, expected) == 0


def test_names_without_the_prefix_are_unchanged() -> None:
    model = _net()
    optimizer = create(model, opt="lookahead_sgd", lr=0.01)
    assert type(optimizer._base_optimizer) is torch.optim.SGD
    assert not gradcentral.attached(optimizer._base_optimizer)


def test_arguments_of_the_train_script() -> None:
    """timm's train.py creates the optimizer from these arguments, and from ``--opt-kwargs``."""
    parser = argparse.ArgumentParser()
    for option, default in {"lr": 0.01, "weight-decay": 0.05, "momentum": 0.9}.items():
        parser.add_argument(f"--{option}", type=float, default=default)
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs)
    args = parser.parse_args(["--opt", "gcadamw", "--opt-kwargs", "placement=update", "strength=0.5"])
    model = _net()
    optimizer = create(model, **timm.optim.optimizer_kwargs(args), **args.opt_kwargs)
    assert isinstance(optimizer, gradcentral.AdamW)
    assert (optimizer.placement, optimizer.strength) == ("update", 0.5)


def test_the_scaler_clips_before_gc_centers() -> None:
    def train(name: str, by_hand: bool) -> tuple[list[Tensor], list[Tensor]]:
        model = _net()
        optimizer = create(model, opt=name, lr=0.1, weight_decay=0.05)
        scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=1)
        average = timm.utils.ModelEmaV3(model, decay=0.5)
        scaler = timm.utils.NativeScaler(device="cpu")
        for epoch in range(4):
            optimizer.zero_grad()
            loss = cross_entropy(model(IMAGES), LABELS)
            if by_hand:
                loss.backward()
                timm.utils.dispatch_clip_grad(model.parameters(), 0.02, mode="agc")
                center_by_hand(model)
                optimizer.step()
            else:
                scaler(loss, optimizer, clip_grad=0.02, clip_mode="agc", parameters=[*model.parameters()])
            average.update(model)
            scheduler.step(epoch + 1)
        return values_of(model), values_of(average.module)

    for centered, expected in zip(train("gcsgd", False), train("sgd", True), strict=True):
        assert difference(centered, expected) < 1e-12


@pytest.mark.parametrize("name", ["gcadamw", "gcadan"])
def test_resuming_from_a_checkpoint_equals_training_on(name: str) -> None:
    model = _net()
    optimizer = create(model, opt=name, lr=0.01, weight_decay=0.05)
    _train(model, optimizer, IMAGES)
    resumed = _net()
    resumed.load_state_dict(model.state_dict())
    optimizer_of_resumed = create(resumed, opt=name, lr=0.01, weight_decay=0.05)
    optimizer_of_resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert difference(_train(resumed, optimizer_of_resumed, IMAGES), _train(model, optimizer, IMAGES)) == 0


def test_optimizers_registered_later_follow_by_calling_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(torch.optim.Adagrad):
        pass

    registry = importlib.import_module("timm.optim._optim_factory").default_registry
    monkeypatch.setattr(registry, "_optimizers", {**registry._optimizers})  # other tests go through all names
    registry.register(timm.optim.OptimInfo("later", Later, description="Adagrad", has_eps=False))
    before = len(timm.optim.list_optimizers())
    adapter.register_optimizers()
    assert len(timm.optim.list_optimizers()) == before + 1
    info = timm.optim.get_optimizer_info("gclater")
    assert (info.has_eps, info.description) == (False, "Adagrad, with Gradient Centralization")
    model = _net()
    optimizer = create(model, opt="gclater", lr=0.01)
    _train(model, optimizer, IMAGES)
    assert largest_mean(w.grad for w in weights_of(model) if w.grad is not None) < 1e-12


def test_errors() -> None:
    model = _net()
    with pytest.raises(ValueError, match="unknown placement 'updates'"):
        create(model, opt="gcadamw", placement="updates")
    with pytest.raises(ValueError, match="whether that of Lion is L2 or decoupled is unknown"):
        create(model, opt="gclion", weight_decay=0.1, placement="regularized")
    with pytest.raises(ValueError, match="gcunknown not found"):
        create(model, opt="gcunknown")
    with pytest.raises(ValueError, match="nothing is left to center"):
        create([model[0].bias], opt="gclion")  # type: ignore[index]
    with pytest.warns(UserWarning, match="no module was found that holds the parameters of shape"):
        create([nn.Parameter(torch.zeros(3, 2))], opt="gclion")


def test_doctest_and_page() -> None:
    assert doctest.testmod(adapter).attempted > 0
    assert doctest.testmod(adapter).failed == 0
    names = run_page("timm")
    assert largest_mean(names["changes"]) < 1e-5
