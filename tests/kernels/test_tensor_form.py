"""A form refuses every tensor that a kernel would misread, with the guards of torch.compile and without them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import gradcentral
from gradcentral.kernels import tensor_form
from gradcentral.kernels.tensor_form import OF_CENTERED, OF_GRADIENTS, OF_LASTING, TensorForm

GUARDS_WORK = tensor_form._guards_work


@pytest.fixture(params=["guards", "properties"], autouse=True)
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with the guards, where this version of torch has them, and without them."""
    if request.param == "properties":
        monkeypatch.setattr(tensor_form, "_guards_work", lambda: False)
    elif not GUARDS_WORK():
        pytest.skip("this version of torch has no guards that can be used")
    return str(request.param)


def _tensor() -> Tensor:
    return torch.arange(12.0).view(3, 4)


ALWAYS = {
    "other strides": _tensor().t().contiguous().t(),
    "a lazy negation": torch._neg_view(_tensor()),
    "another dtype of the same size": _tensor().view(torch.int32),
    "another dtype": _tensor().bfloat16(),
    "fewer elements": _tensor()[:2],
    "sparse": _tensor().to_sparse(),
    "a parameter": nn.Parameter(_tensor()),
}


@pytest.mark.parametrize("properties", [OF_GRADIENTS, OF_CENTERED], ids=["gradients", "centered"])
@pytest.mark.parametrize("difference", ALWAYS)
def test_a_tensor_of_another_form_is_refused(properties: Sequence[tensor_form.Property], difference: str) -> None:
    form = TensorForm([_tensor(), _tensor()], properties)
    assert form.matches([_tensor(), _tensor() + 1])
    assert not form.matches([_tensor(), ALWAYS[difference]])


def test_tensors_to_be_centered_must_have_the_same_shape_and_device() -> None:
    form = TensorForm([_tensor()], OF_CENTERED)
    for other in (_tensor().view(3, 2, 2), _tensor().to("meta")):
        assert not form.matches([other])


def test_lasting_tensors_must_have_the_same_strides() -> None:
    form = TensorForm([_tensor()], OF_LASTING)
    tensor = _tensor()
    assert form.matches([tensor])
    tensor.t_()
    assert not form.matches([tensor])


def test_differences_that_do_not_matter_are_accepted() -> None:
    """The guards refuse a tensor that occurs twice and one that requires a gradient; the kernels do not mind."""
    form = TensorForm([_tensor(), _tensor()], OF_GRADIENTS)
    twice = _tensor()
    assert form.matches([twice, twice])
    assert form.matches([_tensor(), _tensor().requires_grad_()])
    with torch.inference_mode():
        assert form.matches([_tensor(), _tensor()])


def test_the_guards_alone_decide_about_equal_forms(comparison: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the step would take as long as without them."""
    form = TensorForm([_tensor()], OF_GRADIENTS)
    monkeypatch.setattr(TensorForm, "_read", lambda form, tensors: "not read")
    assert form.matches([_tensor()]) == (comparison == "guards")


class _AcceptsEverything:
    def __init__(self, *tensors: Tensor, **dims: object) -> None:
        pass

    def check(self, *tensors: Tensor) -> bool:
        return True


def test_guards_that_compare_less_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", _AcceptsEverything)
    assert not GUARDS_WORK.__wrapped__()
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    assert not GUARDS_WORK.__wrapped__()


def test_a_step_follows_gradients_of_changing_forms() -> None:
    """Each of these gradients has the pointer and the shape of an ordinary one; a kernel would misread it."""
    weight = nn.Linear(4, 3, bias=False)
    expected = weight.weight.detach().clone()
    optimizer = gradcentral.SGD(weight, lr=0.5)
    gradient = torch.randn(3, 4)
    for form in (gradient, torch._neg_view(gradient), gradient.t().contiguous().t(), gradient):
        weight.weight.grad = form
        optimizer.step()
        expected -= 0.5 * gradcentral.center(form, "o [i]")
    torch.testing.assert_close(weight.weight.detach(), expected)
