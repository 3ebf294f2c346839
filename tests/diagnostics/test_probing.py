from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import gradcentral
from gradcentral import WeightVectors, probe, share, weight_layout
from gradcentral.cli.main import app
from gradcentral.diagnostics.input_means import InputMeans
from gradcentral.diagnostics.probe_report import (
    NEAR_TOTAL,
    NO_EFFECT,
    NO_GRADIENT,
    NON_FINITE,
    PARTIAL,
    SKIPPED,
    LayerReport,
    ProbeReport,
)
from gradcentral.experiment import load_task
from gradcentral.experiment.probing import probe_task

mse = nn.functional.mse_loss


def batches(inputs: int = 8, outputs: int = 4, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(32, inputs), torch.randn(32, outputs)) for _ in range(count)]


def layers(report: ProbeReport) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in report.layers}


def feeding(*before: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 64), *before, nn.Linear(64, 4))


def test_after_layer_norm_the_share_is_zero_to_rounding() -> None:
    found = layers(probe(feeding(nn.LayerNorm(64)).double(), mse, [(x.double(), y.double()) for x, y in batches()]))
    assert 0 <= found["2.weight"].share < 1e-28
    assert found["2.weight"].kind == NO_EFFECT
    assert "already centered (as after LayerNorm)" in found["2.weight"].finding
    assert found["2.weight"].input is not None
    assert found["2.weight"].input.offset < 1e-28


def test_after_a_sigmoid_the_share_is_near_one() -> None:
    # All errors have the same sign, as at the start of training with positive targets.
    data = [(x, y.abs() + 1) for x, y in batches()]
    found = layers(probe(feeding(nn.Sigmoid()), mse, data))
    assert found["2.weight"].share > 0.9
    assert found["2.weight"].kind == NEAR_TOTAL
    assert found["2.weight"].finding.startswith("near-total: ")
    assert "as after a sigmoid" in found["2.weight"].finding


def test_after_relu_the_effect_is_partial() -> None:
    found = layers(probe(feeding(nn.ReLU()), mse, batches()))
    assert 0.05 < found["2.weight"].share < 0.9
    assert found["2.weight"].kind == PARTIAL


def test_effects_match_the_gradient_of_each_batch() -> None:
    model, data = feeding(nn.ReLU()), batches()
    expected = []
    for x, y in data:
        model.zero_grad()
        mse(model(x), y).backward()
        gradient = model[2].weight.grad
        assert isinstance(gradient, Tensor)
        expected.append((float(share(gradient, WeightVectors((1,)))), float(gradient.norm())))
    model.zero_grad()
    layer = layers(probe(model, mse, data))["2.weight"]
    assert [effect.share for effect in layer.effects] == pytest.approx([s for s, _ in expected])
    assert layer.share == pytest.approx(sum(s for s, _ in expected) / 3)
    assert layer.spread == pytest.approx(float(torch.tensor([s for s, _ in expected]).std()))
    assert layer.mean("norm") == pytest.approx(sum(n for _, n in expected) / 3)


def test_the_whole_gradient_includes_skipped_parameters() -> None:
    report = probe(nn.Linear(8, 4), mse, batches(count=1))
    weight, bias = report.layers
    energy = weight.mean("norm") ** 2 + bias.mean("norm") ** 2
    assert report.share == pytest.approx(weight.share * weight.mean("norm") ** 2 / energy)
    assert bias.kind == SKIPPED
    assert bias.share == 0
    assert bias.finding == "skipped: bias"


def test_the_total_is_the_sum_of_the_shares_times_the_energies() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = probe(model, mse, batches(count=1))
    energies = {layer.name: report.energy(layer) for layer in report.layers}
    assert sum(energies.values()) == pytest.approx(1)
    assert sum(layer.share * energies[layer.name] for layer in report.layers) == pytest.approx(report.share)
    skipped = energies["0.bias"] + energies["2.bias"]
    assert f"GC removes {report.share:.1%} of the whole gradient's energy." in report.finding
    assert f"and {skipped:.0%} of it is in skipped parameters" in report.finding
    row = next(line for line in str(report).splitlines() if line.startswith("2.weight"))
    assert f"{energies['2.weight']:.1%}" in row.split()
    several = probe(model, mse, batches(count=3))
    weight = several.layers[2]
    whole = sum(effect.norm**2 for effect in several.whole)
    assert several.energy(weight) == pytest.approx(sum(effect.norm**2 for effect in weight.effects) / whole)


def test_the_text_fits_a_terminal_and_gives_causes() -> None:
    torch.manual_seed(0)
    data = [(x, y.abs() + 1) for x, y in batches()]
    text = str(probe(nn.Sequential(*feeding(nn.LayerNorm(64)), nn.Sigmoid(), nn.Linear(4, 4)), mse, data))
    assert max(map(len, text.splitlines())) <= 80
    causes = " ".join(text.partition("Causes:")[2].partition("Skipped:")[0].split())
    assert "no effect: its input is already centered (as after LayerNorm): 2.weight" in causes
    assert "near-total: " in causes
    assert ": 4.weight" in causes
    assert "0.weight" not in causes  # a partial effect is explained by its row


class Traced(nn.Module):
    """A model that contains everything that a training pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.net(x))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_restored_exactly(training: bool) -> None:
    model = Traced().train(training)
    mse(model(torch.randn(9, 8)), torch.randn(9, 4)).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [(p.grad, torch.as_tensor(p.grad).clone()) for p in model.parameters()]
    state = torch.get_rng_state()
    data = batches()
    after_data = torch.get_rng_state()
    probe(model, mse, data)
    assert torch.equal(torch.get_rng_state(), after_data)
    assert not torch.equal(state, after_data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, (tensor, value) in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is tensor
        assert torch.equal(torch.as_tensor(tensor), value)
    assert all(module.training == training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_contexts_of_evaluation_make_no_difference(context: Callable[[], Any]) -> None:
    model, data = Traced().eval(), batches()
    torch.manual_seed(1)
    expected = probe(model, mse, data)
    torch.manual_seed(1)
    with context():
        assert probe(model, mse, data) == expected
        torch.manual_seed(1)
        assert probe(model, mse, [(x.clone(), y.clone()) for x, y in data]) == expected
        assert not torch.is_grad_enabled()
    assert model.net[1].num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_traced_and_exported_models_are_probed_and_restored() -> None:
    model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), batches()
    expected = probe(model, mse, data).losses
    compiled = [
        torch.jit.script(model.eval()),
        torch.jit.trace(model.eval(), data[0][0]),
        torch.export.export(model.train(), data[0][:1]).module(),
        nn.Sequential(torch.jit.script(model.eval())),
    ]
    for other in compiled:
        before = {name: value.clone() for name, value in other.state_dict().items()}
        modes = [module.training for module in other.modules()]
        report = probe(other, mse, data)
        assert report.losses == pytest.approx(expected)
        assert [module.training for module in other.modules()] == modes
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        assert all(parameter.grad is None for parameter in other.parameters())


def test_the_model_is_restored_if_an_input_cannot_be_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = feeding(nn.ReLU()).eval()
    register, registered = nn.Module.register_forward_pre_hook, list[nn.Module]()

    def fail_later(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        if registered:
            raise RuntimeError("no hooks")
        registered.append(module)
        return register(module, *arguments, **options)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", fail_later)
    with pytest.raises(RuntimeError, match="no hooks"):
        probe(model, mse, batches())
    assert not any(module._forward_pre_hooks or module.training for module in model.modules())


def test_the_model_is_probed_in_training_mode() -> None:
    model = Traced().eval()
    data = batches(count=1)
    evaluated = probe(model, mse, data)
    model.train()
    torch.manual_seed(1)
    trained = probe(model, mse, data)
    torch.manual_seed(1)
    assert probe(model.eval(), mse, data).losses == trained.losses
    assert evaluated.losses != trained.losses  # other dropout
    frozen = model.train()
    frozen.net[1].eval()
    torch.manual_seed(1)
    assert probe(frozen, mse, data).losses != trained.losses


def test_frozen_unused_and_non_finite_layers_are_reported() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.frozen, self.unused, self.cut = (nn.Linear(8, 8) for _ in range(4))
            self.frozen.requires_grad_(False)
            self.end = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.end(self.frozen(self.used(x)) + 0 * self.cut(x)))

    model = Odd()
    found = layers(probe(model, mse, batches()))
    assert found["frozen.weight"].finding == "skipped: does not train"
    assert found["unused.weight"].kind == found["cut.weight"].kind == NO_GRADIENT
    assert math.isnan(found["unused.weight"].cosine)
    with torch.no_grad():
        model.used.weight[0, 0] = torch.inf
    report = probe(model, mse, batches())
    assert layers(report)["used.weight"].kind == NON_FINITE
    assert math.isnan(layers(report)["used.weight"].share)
    assert math.isnan(layers(report)["used.weight"].spread)
    assert report.finding == "The effect of GC is unknown: gradients contain NaN or Inf."


def test_a_model_without_any_effect_is_reported() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    finding = probe(model, mse, batches()).finding
    assert 'no effect (1). Placement "gradient" would change almost nothing' in finding
    nothing = nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8))
    assert probe(nothing, mse, batches(1, 8)).finding.startswith("GC centers nothing in this model")


def test_mappings_are_passed_as_keyword_arguments() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": mse(self.linear(x), y)}

    model = Model()
    data = batches(count=2)
    named = probe(model, lambda output, batch: output["loss"], [{"x": x, "y": y} for x, y in data])
    assert named.losses == probe(model.linear, mse, data).losses


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def test_named_tuples_and_packed_sequences_are_supported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 5)

        def forward(self, x: Pair) -> Tensor:
            packed = nn.utils.rnn.pack_sequence([x.a, x.b], enforce_sorted=False)
            return torch.as_tensor(self.rnn(packed, 7 + torch.zeros(1, 2, 5))[1][0])

    batch = (Pair(torch.rand(4, 3), torch.rand(2, 3)), torch.rand(2, 5))
    found = layers(probe(Model(), mse, [batch]))["rnn.weight_ih_l0"].input
    assert found is not None
    assert found.mean == pytest.approx(float(torch.cat(batch[0]).mean()))  # of the sequences, not of the initial state


def test_optimizer_steps_in_backward_hooks_do_not_run() -> None:
    model = nn.Linear(8, 4)
    before = model.weight.detach().clone()

    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter -= torch.as_tensor(parameter.grad)
        parameter.grad = None

    model.weight.register_post_accumulate_grad_hook(step)
    assert probe(model, mse, batches()).layers[0].kind == PARTIAL
    assert torch.equal(model.weight, before)
    mse(model(torch.randn(2, 8)), torch.zeros(2, 4)).backward()
    assert not torch.equal(model.weight, before)  # the hook is restored


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models_are_probed(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.last(checkpoint(self.first, x.requires_grad_(), use_reentrant=reentrant)))

    model, data = Model(), batches()
    plain = nn.Sequential(model.first, model.last)
    shares = [layer.share for layer in probe(model, mse, data).layers]
    assert shares == pytest.approx([layer.share for layer in probe(plain, mse, data).layers])
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_module_and_the_generator_of_a_loader_are_restored() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return mse(self.norm(output), target)

    order = torch.Generator().manual_seed(3)
    examples = list(zip(torch.randn(12, 8), torch.randn(12, 4), strict=True))
    loader = torch.utils.data.DataLoader(examples, 4, shuffle=True, generator=order)  # type: ignore[arg-type, var-annotated]
    loss, state = Learned(), order.get_state()
    probe(nn.Linear(8, 4), loss, loader)
    assert torch.equal(order.get_state(), state)
    assert loss.norm.num_batches_tracked == 0
    assert loss.norm.weight.grad is None


def test_a_cause_is_reported_only_if_it_was_observed() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    layout = weight_layout(attention)
    x = torch.randn(2, 5, 8)
    for memory, seen in ((x, True), (x + 3, False)):
        with InputMeans(attention, layout) as inputs:
            attention(x, memory, memory)
        assert (inputs.of(attention.in_proj_weight) is not None) == seen
    far = [(0.5 + torch.randn(512, 64), torch.full((512, 4), 50.0))]
    report = probe(nn.Linear(64, 4), mse, far)
    assert report.layers[0].kind == NEAR_TOTAL
    assert report.layers[0].finding.endswith("the rest cancels over the batch")
    assert "nearly constant" not in report.finding


def test_layers_with_another_first_argument_are_not_observed() -> None:
    class Timed(nn.Conv2d):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * t.mean()

    module = Timed(2, 3, 3)
    with InputMeans(module, weight_layout(module)) as inputs:
        module(torch.rand(4), torch.rand(1, 2, 5, 5))
    assert inputs.of(module.weight) is None


def test_observing_inputs_does_not_evaluate_parametrizations() -> None:
    module = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    x = torch.rand(1, 2, 5, 5)
    torch.manual_seed(1)
    plain = module(x)
    again = nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 3))
    again.load_state_dict(module.state_dict())
    state = {name: value.clone() for name, value in module.state_dict().items()}
    expected = again(x)
    with InputMeans(module, weight_layout(module)) as inputs:
        assert torch.equal(module(x), expected)
    assert inputs.of(module.parametrizations.weight.original) is not None  # type: ignore[union-attr, arg-type]
    assert state.keys() == module.state_dict().keys()
    assert plain.shape == expected.shape


def test_at_most_max_batches_are_drawn() -> None:
    drawn: list[int] = []

    def endless() -> Any:
        while True:
            drawn.append(1)
            yield batches(count=1)[0]

    assert len(probe(nn.Linear(8, 4), mse, endless(), max_batches=2).losses) == len(drawn) == 2


@pytest.mark.parametrize(
    ("model", "loss", "data", "options", "error", "message"),
    [
        (nn.Linear(8, 4), mse, [], {}, ValueError, "batches: empty"),
        (nn.Linear(8, 4), mse, [torch.ones(2)], {}, TypeError, "a tuple (input, …, target) or a mapping, not a Tensor"),
        (nn.Linear(8, 4), mse, [(1,)], {}, TypeError, "not 1 elements"),
        (nn.Linear(8, 4), lambda o, t: o, batches(), {}, ValueError, "scalar tensor, not one of shape (32, 4)"),
        (nn.Linear(8, 4), lambda o, t: 1.0, batches(), {}, ValueError, "must return a scalar tensor, not a float"),
        (nn.Linear(8, 4), lambda o, t: t.sum(), batches(), {}, ValueError, "compute it from the model's output"),
        (nn.Linear(8, 4), lambda o, t: t.requires_grad_().sum(), batches(), {}, ValueError, "compute it from the"),
        (nn.Linear(8, 4), mse, batches(), {"max_batches": 0}, ValueError, "max_batches must be at least 1"),
        (nn.LazyLinear(4), mse, batches(), {}, ValueError, "model: weight is uninitialized"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    model: nn.Module, loss: Callable[[Any, Any], Any], data: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        probe(model, loss, data, **options)
    assert message in str(caught.value)


def test_the_remedy_for_a_lazy_model_works() -> None:
    model, data = nn.LazyLinear(4), batches()
    with pytest.raises(ValueError, match="run one forward pass of the model first"):
        probe(model, mse, data)
    model(data[0][0])
    assert probe(model, mse, data).layers[0].kind == PARTIAL


def test_the_remedies_for_models_that_cannot_train_work() -> None:
    model, data = nn.Linear(8, 4).requires_grad_(False), batches()
    with pytest.raises(
        ValueError, match=r"model: none of its parameters requires a gradient; call (requires_grad_\(\))"
    ):
        probe(model, mse, data)
    model.weight.requires_grad_()
    assert probe(model, mse, data).layers[0].kind == PARTIAL
    with torch.inference_mode():
        model = nn.Linear(8, 4)
    with pytest.raises(
        ValueError, match="model: weight was created in torch.inference_mode.* create the model outside it"
    ):
        probe(model, mse, data)
    assert probe(nn.Linear(8, 4), mse, data).layers[0].kind == PARTIAL


def test_the_command_that_the_finding_suggests_exists() -> None:
    suggested = re.search(r"run gradcentral (\w+)\.", probe(nn.Linear(8, 4), mse, batches()).finding)
    assert suggested is not None
    assert CliRunner().invoke(app, [suggested[1], "--help"]).exit_code == 0


def test_table_and_csv_list_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    report = probe(feeding(nn.LayerNorm(64)), mse, batches())
    text = str(report)
    assert text.splitlines()[0].split()[:2] == ["parameter", "share"]
    assert "\n  bias: {0..2}.bias ×3\n" in text
    assert report.finding in " ".join(text.split())
    rows = {row["parameter"]: row for row in csv.DictReader(report.to_csv().splitlines())}
    assert list(rows) == [layer.name for layer in report.layers]
    assert float(rows["0.weight"]["share"]) == report.layers[0].share
    assert sum(float(row["energy"]) for row in rows.values()) == pytest.approx(1)
    assert rows["1.weight"]["input_mean"] == ""


def patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    unfolded = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    return unfolded.unflatten(1, (module.groups, -1)).transpose(2, 3)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, dilation=2),
        nn.Conv2d(4, 6, (1, 3), groups=2, padding=(0, 1)),
    ],
)
def test_inputs_of_convolutions_are_patches(module: nn.Conv2d) -> None:
    x = torch.rand(2, 4, 9, 9)
    with InputMeans(module, weight_layout(module)) as inputs:
        module(x)
    found = inputs.of(module.weight)
    seen = patches(module, x)
    assert found is not None
    assert found.mean == pytest.approx(float(seen.mean()))
    in_mean = seen.shape[-1] * seen.mean(-1).square().sum()
    assert found.offset == pytest.approx(float(in_mean / seen.square().sum()))


@pytest.mark.parametrize(
    ("module", "x", "parameter"),
    [
        (nn.Linear(5, 3), torch.rand(2, 4, 5), "weight"),
        (nn.GRU(5, 3), torch.rand(2, 4, 5), "weight_ih_l0"),
        (nn.GRUCell(5, 3), torch.rand(2, 5), "weight_ih"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), torch.rand(2, 5), "parametrizations.weight.original1"),
    ],
)
def test_inputs_of_linear_layers_are_the_last_axis(module: nn.Module, x: Tensor, parameter: str) -> None:
    layout = weight_layout(module)
    with InputMeans(module, layout) as inputs:
        module(x)
        module(x)  # both calls count
    found = inputs.of(dict(module.named_parameters())[parameter])
    assert found is not None
    assert found.mean == pytest.approx(float(x.mean()))
    assert found.offset == pytest.approx(float(5 * x.mean(-1).square().sum() / x.square().sum()))


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_inputs_give_the_report_of_dense_ones(layout: torch.layout) -> None:
    model, data = nn.Linear(8, 4), [(x.relu(), y) for x, y in batches()]
    sparse = [(x.to_sparse(layout=layout), y) for x, y in data]
    found, expected = (probe(model, mse, each).layers[0] for each in (sparse, data))
    assert found.input is not None
    assert found.input == pytest.approx(expected.input)
    assert found.share == pytest.approx(expected.share)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_give_the_report_of_their_parts(layout: torch.layout) -> None:
    model, parts = nn.Linear(8, 4), [torch.rand(3, 8), torch.rand(5, 8)]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return torch.cat([part - target for part in output.unbind()]).square().mean()

    found = probe(model, loss, [(torch.nested.nested_tensor(parts, layout=layout), torch.zeros(4))]).layers[0]
    expected = probe(model, loss, [(torch.cat(parts)[None], torch.zeros(4))]).layers[0]
    assert found.input is not None
    assert found.input == pytest.approx(expected.input)
    assert found.share == pytest.approx(expected.share)


def test_an_input_without_sums_is_not_observed() -> None:
    class Unusual(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is Tensor.sum:
                raise NotImplementedError("no sum")
            return super().__torch_function__(function, types, args, kwargs)

    model = nn.Linear(8, 4)
    with InputMeans(model, weight_layout(model)) as inputs:
        assert model(torch.rand(3, 8).as_subclass(Unusual)).shape == (3, 4)
    assert inputs.of(model.weight) is None


def test_inputs_of_transposed_convolutions_are_the_channels_of_a_group() -> None:
    module, x = nn.ConvTranspose1d(4, 6, 3, groups=2), torch.rand(2, 4, 7)
    with InputMeans(module, weight_layout(module)) as inputs:
        module(x)
    grouped = x.unflatten(1, (2, 2))
    found = inputs.of(module.weight)
    assert found is not None
    assert found.offset == pytest.approx(float(2 * grouped.mean(2).square().sum() / x.square().sum()))


def test_inputs_of_bilinear_layers_are_not_observed() -> None:
    module = nn.Bilinear(4, 4, 3)
    with InputMeans(module, weight_layout(module)) as inputs:
        module(torch.rand(2, 4), torch.rand(2, 4))
    assert inputs.of(module.weight) is None


def test_the_removed_part_is_what_the_input_mean_contributes() -> None:
    """Per unit, eᵀg = √M Σ δ·mean(x): the cause that the findings report."""
    model = nn.Linear(8, 4).double()
    x, y = torch.rand(32, 8).double(), torch.rand(32, 4).double()
    output = model(x)
    output.retain_grad()
    mse(output, y).backward()
    assert isinstance(model.weight.grad, Tensor)
    torch.testing.assert_close(model.weight.grad.mean(1), torch.as_tensor(output.grad).T @ x.mean(1))


@pytest.mark.parametrize("name", ["digits", "wine"])
def test_tasks_are_probed_on_their_batches(name: str) -> None:
    task = load_task(name)
    assert not isinstance(task, gradcentral.experiment.CustomTask)
    state = torch.get_rng_state()
    report = probe_task(task, batches=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert probe_task(task, batches=2) == report
    assert probe_task(task, batches=2, seed=1) != report
    assert all(layer.kind in (PARTIAL, NEAR_TOTAL) for layer in report.centered)


def test_the_plot_shows_every_centered_parameter() -> None:
    report = probe(feeding(nn.ReLU()), mse, batches())
    (axis,) = report.plot().axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.weight", "2.weight"]
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == pytest.approx([layer.share for layer in report.centered])


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_scale_of_loss_and_inputs_does_not_matter(scale: float) -> None:
    """The squares of these gradients and inputs do not fit into float32."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    x, y = batches(count=1)[0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output * target).sum()

    usual = probe(model, loss, [(x, y)]).layers[0]
    of_loss = probe(model, lambda output, target: loss(output, target) * scale, [(x, y)]).layers[0]
    of_inputs = probe(model, loss, [(x * scale, y)]).layers[0]
    for scaled in (of_loss, of_inputs):
        assert scaled.share == pytest.approx(usual.share, rel=1e-4)
        assert scaled.effects[0].norm == pytest.approx(usual.effects[0].norm * scale, rel=1e-4)
    assert usual.input is not None
    assert of_inputs.input is not None
    assert of_inputs.input.offset == pytest.approx(usual.input.offset, rel=1e-4)
    assert of_inputs.input.mean == pytest.approx(usual.input.mean * scale, rel=1e-4)
