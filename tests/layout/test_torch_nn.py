"""Every layer of torch.nn: its weight vectors, verified by theorem 4.1 of the paper."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from gradcentral import WeightLayout, WeightVectors, centralize, weight_layout

Double = Callable[[nn.Module], nn.Module]


def _old_style(wrap: Callable[..., nn.Module], module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # torch deprecates the functions, but existing models use them
        warnings.simplefilter("ignore", FutureWarning)
        return wrap(module)


CENTERED: list[tuple[str, Callable[[], nn.Module], dict[str, tuple[int, int]]]] = [
    # layer, {parameter: (count, fan-in)}
    ("Linear", lambda: nn.Linear(4, 3), {"weight": (3, 4)}),
    ("Bilinear", lambda: nn.Bilinear(4, 5, 3), {"weight": (3, 20)}),
    ("Conv1d", lambda: nn.Conv1d(4, 6, 3), {"weight": (6, 12)}),
    ("Conv2d grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), {"weight": (6, 18)}),
    ("Conv2d depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4), {"weight": (4, 9)}),
    ("Conv3d", lambda: nn.Conv3d(2, 3, 2), {"weight": (3, 16)}),
    ("ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 6, 3), {"weight": (6, 12)}),
    ("ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 6, 3), {"weight": (6, 36)}),
    ("ConvTranspose2d grouped", lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), {"weight": (6, 18)}),
    ("ConvTranspose3d", lambda: nn.ConvTranspose3d(2, 3, 2), {"weight": (3, 16)}),
    ("ConvTranspose2d strided", lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2), {"weight": (24, 8)}),
    (
        "LSTM",
        lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3),
        {
            f"weight_{kind}_l{layer}{direction}": shape
            for layer in (0, 1)
            for direction in ("", "_reverse")
            for kind, shape in (("ih", (24, 4 if layer == 0 else 6)), ("hh", (24, 3)), ("hr", (3, 6)))
        },
    ),
    ("GRU", lambda: nn.GRU(4, 5), {"weight_ih_l0": (15, 4), "weight_hh_l0": (15, 5)}),
    ("RNN", lambda: nn.RNN(4, 5), {"weight_ih_l0": (5, 4), "weight_hh_l0": (5, 5)}),
    ("LSTMCell", lambda: nn.LSTMCell(4, 5), {"weight_ih": (20, 4), "weight_hh": (20, 5)}),
    ("MultiheadAttention", lambda: nn.MultiheadAttention(4, 2), {"in_proj_weight": (12, 4), "out_proj.weight": (4, 4)}),
    (
        "MultiheadAttention with kdim and vdim",
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        {"q_proj_weight": (4, 4), "k_proj_weight": (4, 3), "v_proj_weight": (4, 5), "out_proj.weight": (4, 4)},
    ),
    (
        "AdaptiveLogSoftmax",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3]),
        {"head.weight": (4, 4), "tail.0.0.weight": (1, 4)},
    ),
    ("a subclass", lambda: type("Mine", (nn.Linear,), {})(4, 3), {"weight": (3, 4)}),
    (
        "weight_norm",
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        {"parametrizations.weight.original1": (3, 4)},
    ),
    ("weight_norm, old style", lambda: _old_style(nn.utils.weight_norm, nn.Conv1d(4, 3, 5)), {"weight_v": (3, 20)}),
    (
        "spectral_norm of a grouped transposed convolution",
        lambda: parametrizations.spectral_norm(nn.ConvTranspose2d(4, 6, 3, groups=2)),
        {"parametrizations.weight.original": (6, 18)},
    ),
    ("spectral_norm, old style", lambda: _old_style(nn.utils.spectral_norm, nn.Linear(4, 3)), {"weight_orig": (3, 4)}),
]


@pytest.mark.parametrize(("make", "expected"), [c[1:] for c in CENTERED], ids=[c[0] for c in CENTERED])
def test_count_and_fan_in_of_every_layer(make: Callable[[], nn.Module], expected: dict[str, tuple[int, int]]) -> None:
    layout = weight_layout(make())
    found = {e.name: (e.vectors.count, e.vectors.fan_in) for e in layout.entries if e.vectors is not None}
    assert found == expected
    assert not layout.unknown


SKIPPED: list[tuple[str, Callable[[], nn.Module], str, str]] = [
    ("Embedding", lambda: nn.Embedding(9, 4), "weight", "lookup"),
    ("EmbeddingBag", lambda: nn.EmbeddingBag(9, 4), "weight", "lookup"),
    ("LayerNorm", lambda: nn.LayerNorm((3, 4)), "weight", "normalization"),
    ("RMSNorm", lambda: nn.RMSNorm((3, 4)), "weight", "normalization"),
    ("BatchNorm", lambda: nn.BatchNorm2d(3), "weight", "normalization"),
    ("GroupNorm", lambda: nn.GroupNorm(1, 3), "weight", "normalization"),
    ("InstanceNorm", lambda: nn.InstanceNorm1d(3, affine=True), "weight", "normalization"),
    ("PReLU", lambda: nn.PReLU(3), "weight", "activation"),
    ("bias", lambda: nn.Conv2d(3, 4, 3), "bias", "bias"),
    ("bias_k", lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", "token"),
    ("fan-in 1 Linear", lambda: nn.Linear(1, 4), "weight", "fan-in 1"),
    ("fan-in 1 depthwise", lambda: nn.Conv2d(3, 3, 1, groups=3), "weight", "fan-in 1"),
    ("fan-in 1 transposed", lambda: nn.ConvTranspose2d(3, 6, 1, groups=3), "weight", "fan-in 1"),
    (
        "weight_norm g",
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        "parametrizations.weight.original0",
        "magn",
    ),
    ("old weight_norm g", lambda: _old_style(nn.utils.weight_norm, nn.Linear(4, 3)), "weight_g", "magnitude"),
    ("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(4, 3)), "parametrizations.weight.original", "orthog"),
    ("pruned", lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 2), "weight_orig", "pruned"),
    ("ParameterList", lambda: nn.ParameterList([torch.zeros(3, 4)]), "0", "no rule for ParameterList.0"),
]


@pytest.mark.parametrize(("make", "name", "reason"), [c[1:] for c in SKIPPED], ids=[c[0] for c in SKIPPED])
def test_parameters_that_are_skipped(make: Callable[[], nn.Module], name: str, reason: str) -> None:
    layout = weight_layout(make())
    assert reason in layout.skipped[name]
    assert name not in layout
    with pytest.raises(KeyError, match="is skipped"):
        layout[name]


def test_quantization_aware_layers_inherit_their_rules() -> None:
    qat = pytest.importorskip("torch.ao.nn.qat")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qat_qconfig

        config = get_default_qat_qconfig("fbgemm")
    assert weight_layout(qat.Linear(4, 3, qconfig=config))["weight"].fan_in == 4
    assert weight_layout(qat.Conv2d(4, 3, 3, qconfig=config))["weight"].fan_in == 36


def test_parameters_behind_two_parametrizations_are_unknown() -> None:
    layer = parametrizations.spectral_norm(parametrizations.spectral_norm(nn.Linear(4, 3)))
    assert [e.reason for e in weight_layout(layer).unknown] == ["parametrized by _SpectralNorm, _SpectralNorm"]


def test_weights_of_unexpected_shape_are_unknown() -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(12))
    assert weight_layout(layer).unknown[0].reason == "shape (12,) does not fit Linear: expected 'o [i]'"


def _with_shape(layer: nn.Module, name: str, shape: tuple[int, ...]) -> nn.Module:
    layer.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return layer


@pytest.mark.parametrize(
    ("layer", "name", "shape"),
    [
        (nn.Linear(6, 4), "weight", (6, 4)),
        (nn.Bilinear(4, 5, 3), "weight", (4, 5, 3)),
        (nn.Conv1d(4, 6, 3), "weight", (3, 4, 6)),
        (nn.Conv2d(4, 6, 3), "weight", (3, 3, 4, 6)),
        (nn.Conv2d(3, 8, 3), "weight", (3, 3, 3, 8)),
        (nn.Conv2d(3, 8, 5), "weight", (8, 5, 5, 3)),
        (nn.Conv2d(4, 6, 3, groups=2), "weight", (6, 4, 3, 3)),  # a dense kernel, masked to its groups
        (nn.Conv2d(4, 6, 3, groups=2), "weight", (4, 3, 3, 3)),  # [in, out/groups]
        (nn.ConvTranspose2d(4, 6, 3), "weight", (6, 4, 3, 3)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", (4, 6, 3, 3)),
        (nn.LSTM(4, 5), "weight_ih_l0", (4, 20)),
        (nn.LSTM(4, 5), "weight_hh_l0", (5, 20)),
        (nn.LSTM(4, 6, proj_size=3), "weight_hr_l0", (6, 3)),
        (nn.GRU(4, 5, 2, bidirectional=True), "weight_ih_l1_reverse", (10, 15)),
        (nn.RNN(4, 5, 2, bidirectional=True), "weight_ih_l1", (10, 5)),
        (nn.LSTMCell(4, 5), "weight_ih", (4, 20)),
        (nn.GRUCell(4, 5), "weight_hh", (5, 15)),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", (4, 12)),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "k_proj_weight", (3, 4)),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "v_proj_weight", (5, 4)),
        (nn.Embedding(9, 4), "weight", (4, 9)),
        (nn.EmbeddingBag(9, 4), "weight", (4, 9)),
    ],
)
def test_weights_that_contradict_the_sizes_of_their_layer_are_unknown(
    layer: nn.Module, name: str, shape: tuple[int, ...]
) -> None:
    """As in a subclass that stores them in another order: its axes are not those of the layer."""
    subclass = type("Mine", (type(layer),), {})
    layer.__class__ = subclass
    layout = weight_layout(_with_shape(layer, name, shape))
    (entry,) = [entry for entry in layout.entries if entry.name == name]
    assert entry.unknown
    assert entry.reason.startswith(f"shape {shape} does not fit Mine: expected ")


@pytest.mark.parametrize(
    ("layer", "shape", "pattern"),
    [
        (nn.Linear(6, 4), (3, 6), "o [i]"),  # a head cut to some classes
        (nn.Bilinear(4, 5, 3), (2, 4, 5), "o [i j]"),
        (nn.Conv2d(3, 8, 3), (8, 1, 3, 3), "o [i k k]"),  # the sum over colors, for gray images
        (nn.Conv2d(3, 8, 3), (5, 3, 5, 5), "o [i k k]"),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (3, 2, 4), "[i] o ([m] 2)"),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (8, 5, 1, 1), "(2 [i]) o [k k]"),
        (parametrizations.spectral_norm(nn.Linear(6, 4)), (3, 6), "o [i]"),
    ],
    ids=str,
)
def test_a_layer_of_torch_nn_may_receive_a_weight_of_another_size(
    layer: nn.Module, shape: tuple[int, ...], pattern: str
) -> None:
    """The stored sizes are out of date then, and torch's own forward ignores them."""
    name = next(name for name, p in layer.named_parameters() if p.ndim > 1)
    owner, _, local = name.rpartition(".")
    _with_shape(layer.get_submodule(owner), local, shape)
    assert weight_layout(layer)[name].pattern == pattern


def test_a_layer_with_a_forward_of_its_own_is_compared_with_its_sizes() -> None:
    layer = _with_shape(nn.Linear(6, 4), "weight", (6, 4))
    layer.forward = lambda x: x @ layer.weight
    assert [entry.name for entry in weight_layout(layer).unknown] == ["weight"]


def test_an_embedding_with_more_rows_remains_a_lookup_table() -> None:
    assert "lookup" in weight_layout(_with_shape(nn.Embedding(9, 4), "weight", (12, 4))).skipped["weight"]


# Theorem 4.1 of the paper: after any number of GC steps, adding γ to every input of a unit changes its
# output by γ·1ᵀw⁰. So the trained layer on shifted inputs equals the trained layer whose bias has γ·1ᵀw⁰ added.

GAMMA = 0.7


def _train(layer: nn.Module, loss: Callable[[nn.Module], Tensor], layout: WeightLayout | None = None) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    centralize(optimizer, None if layout else layer, layout=layout)
    for _ in range(5):
        optimizer.zero_grad()
        torch.autograd.backward(loss(layer))
        optimizer.step()


def _shape_rule(layer: nn.Module) -> WeightLayout:
    return WeightLayout.from_shapes(p for p in layer.parameters() if p.ndim > 1)


def _interior(output: Tensor, margin: int = 2) -> Tensor:
    """Return the positions that every tap of a transposed convolution of size 3 reaches."""
    return output[:, :, margin:-margin, margin:-margin]


def _error(
    layer: nn.Module,
    before: nn.Module,
    weight: str,
    size: tuple[int, ...],
    axes: tuple[int, ...],
    view: tuple[int, ...] | None = None,
) -> float:
    """Return the largest violation of the theorem for a layer that is linear in its only input."""
    x = torch.randn(*size, dtype=torch.float64)
    w0 = before.get_parameter(weight).detach()
    sums = (w0 if view is None else w0.reshape(view)).sum(axes).flatten()
    change = layer(x + GAMMA) - layer(x)
    if isinstance(layer, nn.ConvTranspose2d):
        change = _interior(change)
    if change.ndim > 2:
        change = change.movedim(1, -1)
    return float((change - GAMMA * sums).detach().abs().max())


THEOREM: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], tuple[int, ...] | None, bool]] = [
    # layer, input size, axes that Σw⁰ runs over, view, whether the shape rule is right
    ("Linear", lambda: nn.Linear(6, 4), (8, 6), (1,), None, True),
    ("Conv2d", lambda: nn.Conv2d(3, 4, 3), (2, 3, 7, 7), (1, 2, 3), None, True),
    ("Conv2d grouped", lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7), (1, 2, 3), None, True),
    ("ConvTranspose2d", lambda: nn.ConvTranspose2d(3, 4, 3), (2, 3, 7, 7), (0, 2, 3), None, False),
    (
        "ConvTranspose2d grouped",
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
        (2, 4, 7, 7),
        (1, 3, 4),
        (2, 2, 3, 3, 3),
        False,
    ),
]


@pytest.mark.parametrize(
    ("make", "size", "axes", "view", "shape_rule_right"), [c[1:] for c in THEOREM], ids=[c[0] for c in THEOREM]
)
def test_theorem_holds_for_layers_that_are_linear_in_their_input(
    make: Callable[[], nn.Module],
    size: tuple[int, ...],
    axes: tuple[int, ...],
    view: tuple[int, ...] | None,
    shape_rule_right: bool,
) -> None:
    x = torch.randn(*size, dtype=torch.float64) + 0.5

    def loss(layer: nn.Module) -> Tensor:
        output: Tensor = layer(x)
        return output.tanh().square().mean() * 10

    before = make().double()
    layer = copy.deepcopy(before)
    _train(layer, loss)
    assert not torch.equal(layer.get_parameter("weight"), before.get_parameter("weight"))
    assert _error(layer, before, "weight", size, axes, view) < 1e-12

    by_shape = copy.deepcopy(before)
    _train(by_shape, loss, _shape_rule(by_shape))
    violated = _error(by_shape, before, "weight", size, axes, view) > 1e-4
    assert violated is not shape_rule_right


def test_theorem_fails_for_grouped_transposed_convolutions_without_splitting_groups() -> None:
    """``[i] o [k k]`` is correct for one group only; with more groups, its means run over filters of several groups."""
    before = nn.ConvTranspose2d(4, 6, 3, groups=2).double()
    layer = copy.deepcopy(before)
    layout = weight_layout(layer, overrides={"weight": "[i] o [k k]"})
    _train(layer, lambda m: m(torch.ones(1, 4, 5, 5, dtype=torch.float64)).tanh().square().sum(), layout)
    assert _error(layer, before, "weight", (2, 4, 7, 7), (1, 3, 4), (2, 2, 3, 3, 3)) > 1e-4


def _with_bias_added(layer: nn.Module, bias: str, sums: Tensor) -> nn.Module:
    shifted = copy.deepcopy(layer)
    with torch.no_grad():
        shifted.get_parameter(bias).add_(GAMMA * sums)
    return shifted


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_theorem_holds_for_recurrent_layers(kind: Callable[[int, int], nn.RNNBase]) -> None:
    before = kind(5, 4).double()
    layer = copy.deepcopy(before)
    x = torch.randn(6, 3, 5, dtype=torch.float64) + 0.5
    _train(layer, lambda m: m(x)[0].square().sum())
    shifted = _with_bias_added(layer, "bias_ih_l0", before.get_parameter("weight_ih_l0").sum(1))
    torch.testing.assert_close(layer(x + GAMMA)[0], shifted(x)[0], rtol=0, atol=1e-12)

    # The hidden state feeds weight_hh: one step from a shifted state.
    x, h = x[:1], torch.randn(1, 3, 4, dtype=torch.float64)
    shifted = _with_bias_added(layer, "bias_hh_l0", before.get_parameter("weight_hh_l0").sum(1))

    def state(hidden: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (hidden, torch.zeros_like(hidden)) if kind is nn.LSTM else hidden

    if kind is nn.GRU:  # its output includes the hidden state itself: (1 − z)·n + z·h
        gates = [
            nn.functional.linear(hidden, m.get_parameter("weight_hh_l0"), m.get_parameter("bias_hh_l0"))
            for m, hidden in ((layer, h + GAMMA), (shifted, h))
        ]
        torch.testing.assert_close(gates[0], gates[1], rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(layer(x, state(h + GAMMA))[0], shifted(x, state(h))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("own_dims", [False, True])
def test_theorem_holds_for_multihead_attention(own_dims: bool) -> None:
    dims = {"kdim": 3, "vdim": 5} if own_dims else {}
    before = nn.MultiheadAttention(4, 2, **dims).double()
    layer = copy.deepcopy(before)
    q, k, v = (
        torch.randn(6, 2, size, dtype=torch.float64) + 0.5 for size in (4, dims.get("kdim", 4), dims.get("vdim", 4))
    )
    _train(layer, lambda m: m(q, k, v)[0].square().sum())
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if own_dims else ["in_proj_weight"]
    sums = torch.cat([before.get_parameter(name).sum(1) for name in names])
    shifted = _with_bias_added(layer, "in_proj_bias", sums)
    with torch.no_grad():
        out_sums = before.get_parameter("out_proj.weight").sum(1)
    torch.testing.assert_close(layer(q + GAMMA, k + GAMMA, v + GAMMA)[0], shifted(q, k, v)[0], rtol=0, atol=1e-12)
    z = torch.randn(3, 4, dtype=torch.float64)
    change = layer.out_proj(z + GAMMA) - layer.out_proj(z)
    torch.testing.assert_close(change, (GAMMA * out_sums).expand(3, 4), rtol=0, atol=1e-12)


def test_theorem_holds_for_bilinear_layers_in_the_products_of_their_inputs() -> None:
    before = nn.Bilinear(3, 4, 2).double()
    layer = copy.deepcopy(before)
    x1, x2 = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    _train(layer, lambda m: m(x1, x2).square().sum())
    products = torch.einsum("bi,bj->bij", x1, x2)
    w = layer.get_parameter("weight")
    change = torch.einsum("bij,oij->bo", products + GAMMA, w) - torch.einsum("bij,oij->bo", products, w)
    torch.testing.assert_close(
        change, (GAMMA * before.get_parameter("weight").sum((1, 2))).expand(8, 2), rtol=0, atol=1e-12
    )


# Transposed convolutions: an output depends only on the taps of its phase, so each phase has its own weight vector.


class Up(NamedTuple):
    """A transposed convolution, its expected pattern, and the pattern of whole filters."""

    make: Callable[[], nn.Module]
    pattern: str
    filters: str
    size: tuple[int, ...]


PHASES = {
    "1d, k=s": Up(lambda: nn.ConvTranspose1d(6, 4, 2, stride=2), "[i] o k", "[i] o [k]", (9,)),
    "1d, k=2s": Up(lambda: nn.ConvTranspose1d(6, 4, 16, 8, padding=4), "[i] o ([m] 8)", "[i] o [k]", (9,)),
    "2d, k=s": Up(lambda: nn.ConvTranspose2d(6, 4, 2, stride=2), "[i] o k k", "[i] o [k k]", (5, 6)),
    "2d, k=2s": Up(
        lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1), "[i] o ([m] 2) ([m] 2)", "[i] o [k k]", (7, 6)
    ),
    "output_padding": Up(
        lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, output_padding=1),
        "[i] o ([m] 2) ([m] 2)",
        "[i] o [k k]",
        (7, 6),
    ),
    "k=s, groups": Up(
        lambda: nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), "(2 [i]) o k k", "(2 [i]) o [k k]", (5, 6)
    ),
    "k=2s, groups": Up(
        lambda: nn.ConvTranspose2d(6, 4, 4, stride=2, groups=2),
        "(2 [i]) o ([m] 2) ([m] 2)",
        "(2 [i]) o [k k]",
        (7, 6),
    ),
    "k=2s, depthwise": Up(
        lambda: nn.ConvTranspose1d(6, 6, 4, stride=2, groups=6), "(6 [i]) o ([m] 2)", "(6 [i]) o [k]", (9,)
    ),
    "mixed strides": Up(
        lambda: nn.ConvTranspose2d(6, 4, (3, 4), stride=(1, 2)), "[i] o [k] ([m] 2)", "[i] o [k k]", (7, 6)
    ),
    "3d, k=s": Up(lambda: nn.ConvTranspose3d(4, 3, 2, stride=2), "[i] o k k k", "[i] o [k k k]", (3, 4, 3)),
    "3d, k=2s": Up(
        lambda: nn.ConvTranspose3d(2, 3, (4, 4, 2), stride=2), "[i] o ([m] 2) ([m] 2) k", "[i] o [k k k]", (4, 4, 3)
    ),
    "stride beyond the kernel": Up(lambda: nn.ConvTranspose1d(6, 4, 2, stride=3), "[i] o k", "[i] o [k]", (9,)),
    "dilation 3, stride 2": Up(
        lambda: nn.ConvTranspose1d(6, 4, 4, stride=2, dilation=3), "[i] o ([m] 2)", "[i] o [k]", (9,)
    ),
    "dilation 2, stride 4": Up(
        lambda: nn.ConvTranspose1d(6, 4, 4, stride=4, dilation=2), "[i] o ([m] 2)", "[i] o [k]", (9,)
    ),
}


def _drift(layer: nn.Module, before: nn.Module, x: Tensor) -> float:
    """Return how much training has changed the response to γ, at positions that all taps of their phase reach."""
    with torch.no_grad():
        counts = copy.deepcopy(layer)
        for parameter in counts.parameters():
            parameter.fill_(float(parameter.ndim > 1))  # no bias
        reached = counts(torch.ones_like(x)).round()
        response, initial = (m(x + GAMMA) - m(x) for m in (layer, before))
        inside = reached == weight_layout(layer)["weight"].fan_in
        assert inside.any()
        return float((response - initial)[inside].abs().max())


@pytest.mark.parametrize("up", PHASES.values(), ids=PHASES)
def test_theorem_holds_for_strided_transposed_convolutions(up: Up) -> None:
    torch.manual_seed(0)
    before = up.make().double()
    shape = before.get_parameter("weight").shape
    assert weight_layout(before)["weight"].agrees_with(WeightVectors.parse(up.pattern, shape))
    x = torch.randn(2, shape[0], *up.size, dtype=torch.float64) + 0.5

    def loss(layer: nn.Module) -> Tensor:
        output: Tensor = layer(x)
        return output.tanh().square().mean() * 10

    layer = copy.deepcopy(before)
    _train(layer, loss)
    assert not torch.equal(layer.get_parameter("weight"), before.get_parameter("weight"))
    assert _drift(layer, before, x) <= 1e-14

    filters = copy.deepcopy(before)
    _train(filters, loss, weight_layout(filters, overrides={"weight": up.filters}))
    assert _drift(filters, before, x) > 1e-4


def test_dilation_by_the_stride_leaves_one_phase() -> None:
    layer = nn.ConvTranspose2d(6, 4, 4, stride=2, dilation=2)
    assert weight_layout(layer)["weight"].pattern == "[i] o [k k]"


def test_depthwise_up_convolutions_with_one_tap_per_output_are_skipped() -> None:
    layout = weight_layout(nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6))
    assert "fan-in 1" in layout.skipped["weight"]


def test_lazy_and_parametrized_transposed_convolutions_have_the_same_weight_vectors() -> None:
    lazy = nn.LazyConvTranspose2d(4, 4, stride=2, padding=1)
    layout = weight_layout(lazy)
    assert "lazy" in layout.skipped["weight"]
    lazy(torch.zeros(1, 6, 5, 5))
    layout.refresh()
    assert layout["weight"].pattern == "[i] o ([m] 2) ([m] 2)"
    normed = parametrizations.spectral_norm(nn.ConvTranspose2d(6, 4, 4, stride=2))
    assert weight_layout(normed)["parametrizations.weight.original"].pattern == "[i] o ([m] 2) ([m] 2)"


def test_a_stride_assigned_as_one_number_holds_for_all_axes() -> None:
    layer = nn.ConvTranspose2d(6, 4, 4)
    layer.stride = 2  # type: ignore[assignment]  # torch accepts it too
    assert weight_layout(layer)["weight"].pattern == "[i] o ([m] 2) ([m] 2)"


def test_transposed_convolution_with_uneven_phases_keeps_only_the_sum_over_phases() -> None:
    """With kernel 3 and stride 2, outputs see one or two taps along an axis: a documented limit."""
    before = nn.ConvTranspose2d(3, 2, (3, 4), stride=2).double()
    layer = copy.deepcopy(before)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    _train(layer, lambda m: m(x + 0.5).tanh().square().sum())
    change = (layer(x + GAMMA) - layer(x))[:, :, 4:-5, 4:-4]
    phases = change.unflatten(2, (-1, 2)).sum(3)  # only the even axis has a weight vector per phase
    taps = before.get_parameter("weight").unflatten(3, (2, 2))
    expected = (GAMMA * taps.sum((0, 2, 3)))[None, :, None, :].repeat(1, 1, 1, phases.shape[3] // 2)
    torch.testing.assert_close(phases, expected.expand_as(phases), rtol=0, atol=1e-12)
