"""The layout of a model: for each parameter, which elements form one weight vector, or why it is skipped."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from textwrap import indent
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT

from gradcentral.caller import level_of_caller
from gradcentral.layout import table
from gradcentral.layout.recipe import Recipe, Selector
from gradcentral.layout.rules import LAZY, Entry, LeaveAlone, Rule, apply_rule, check_rule, not_centerable, too_few_axes
from gradcentral.layout.search import find_models
from gradcentral.layout.sites import refuse_flat, sites
from gradcentral.layout.structure import Structure, is_gathered
from gradcentral.weight_vectors import WeightVectors

__all__ = ["WeightLayout", "weight_layout"]

_SHAPE_RULE = "shape rule"


class WeightLayout(Mapping[Tensor, WeightVectors]):
    """The weight vectors of a model: a mapping from each centered parameter to its `WeightVectors`.

    Created by `weight_layout`, `WeightLayout.from_parameters` or `WeightLayout.from_shapes`. Parameters can be looked
    up by name too; iteration is over the centered parameters; printing shows a table.

    Attributes:
        entries: one `Entry` per parameter of the model, centered or skipped, in the model's order.
        pending: whether there are lazy parameters whose shapes were unknown when the layout was last refreshed.
        revision: number of times that `refresh` has updated the entries.
    """

    def __init__(self, entries: Sequence[Entry], recipe: Recipe | None = None, guessed: Sequence[Entry] = ()) -> None:
        self._recipe = recipe
        self._guessed = guessed
        self.revision = -1
        self._set([*entries, *guessed])
        self._structure = Structure(recipe.models()) if recipe else None

    def _set(self, entries: Sequence[Entry]) -> None:
        self.revision += 1
        self.entries = tuple(entries)
        self.pending = any(entry.reason == LAZY for entry in self.entries)
        self._centered = {entry.parameter: entry.vectors for entry in self.entries if entry.vectors is not None}
        self._by_key: dict[object, Entry] = {  # by the parameter and by each of its names
            key: entry for entry in self.entries for key in (entry.parameter, entry.name, *entry.aliases)
        }

    def __reduce__(self) -> tuple[type[WeightLayout], tuple[tuple[Entry, ...]]]:
        # A copy belongs to copies of the parameters, not to the original model, so it cannot be refreshed from it.
        return type(self), (self.entries,)

    @classmethod
    def from_shapes(cls, params: ParamsT) -> WeightLayout:
        """Create a layout from shapes alone, without a model: ``"o [i...]"``, the mean over axes 1 and up.

        This is right for plain Linear and convolution layers, and **wrong** for embeddings, transposed convolutions and
        every layer that stores its weights as [in, out]. Prefer `weight_layout`, which inspects the modules.

        Args:
            params: parameters, (name, parameter) pairs, or an optimizer's ``param_groups``.

        Raises:
            TypeError: params holds anything else.
            ValueError: a parameter is a flat part, as made by FSDP1 or DeepSpeed's ZeRO-3.

        Examples:
            >>> import torch
            >>> layout = WeightLayout.from_shapes([torch.zeros(4, 3), torch.zeros(4)])
            >>> len(layout), layout.skipped
            (1, {'1': 'one-dimensional'})
        """
        return cls([_entry_by_shape(*numbered) for numbered in enumerate(_named(params))])

    @classmethod
    def from_parameters(
        cls,
        params: ParamsT,
        *,
        only: str = "all",
        overrides: Mapping[Selector, Rule] | None = None,
        exclude: Iterable[Selector] = (),
    ) -> WeightLayout:
        """Create the `weight_layout` of the models that hold these parameters, where the models are not at hand.

        All modules of the process are searched for the parameters (about 0.1 s for two million Python objects). Names
        start at the outermost module: a wrapper adds its prefix, and two separate models are "0" and "1". Parameters
        that no module holds are decided by their shapes, as by `from_shapes`, with a warning.

        Args:
            params: parameters, (name, parameter) pairs, or an optimizer's ``param_groups``.
            only, overrides, exclude: see `weight_layout`.

        Examples:
            >>> import torch
            >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2))
            >>> list(WeightLayout.from_parameters(model.parameters()).skipped)
            ['0.weight', '1.bias']
        """
        named = [*_named(params)]
        return _layout_of(find_models([tensor for _, tensor in named]), only, overrides, exclude, named)

    def __getitem__(self, key: Tensor | str) -> WeightVectors:
        """Return the weight vectors of a parameter or its name; a KeyError gives the reason if it is skipped."""
        if (entry := self._by_key.get(key)) is None:
            what = repr(key) if isinstance(key, str) else f"a tensor of shape {tuple(key.shape)}"
            raise KeyError(f"{what} is not a parameter of the model that this layout was created for")
        if entry.vectors is None:
            raise KeyError(f"{entry.name} is skipped: {entry.reason}")
        return entry.vectors

    def __contains__(self, key: object) -> bool:
        return (entry := self._by_key.get(key)) is not None and entry.vectors is not None

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._centered)

    def __len__(self) -> int:
        return len(self._centered)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def skipped(self) -> dict[str, str]:
        """``{name: reason}`` of every parameter that is skipped."""
        return {entry.name: entry.reason for entry in self.entries if entry.vectors is None}

    @property
    def names(self) -> dict[Tensor, str]:
        """``{parameter: name}`` of every parameter of the model, centered or skipped."""
        return {entry.parameter: entry.name for entry in self.entries}

    @property
    def unknown(self) -> tuple[Entry, ...]:
        """The trained entries skipped only because no rule covers them: raw parameters and unexpected shapes."""
        return tuple(entry for entry in self.entries if entry.unknown)

    def in_model(self, parameter: Tensor) -> bool:
        """Return whether the parameter belongs to this layout's model, centered or skipped."""
        return parameter in self._by_key

    def refresh(self) -> None:
        """Update the entries for the current model: lazy parameters may have shapes now, layers may have been added.

        Raises:
            RuntimeError: the layout was copied or created from shapes before the first forward, so it has no model.
        """
        if self._recipe and (model := self._recipe.model()) is not None:
            entries = self._recipe.entries(model)
            found = {entry.parameter for entry in entries}
            self._set([*entries, *(entry for entry in self._guessed if entry.parameter not in found)])
        elif any(entry.reason == LAZY and not is_lazy(entry.parameter) for entry in self.entries):
            raise RuntimeError(
                "this layout was copied, or created from shapes, while parameters were lazy, so it has no model to "
                "refresh from: create the layout and the optimizer again"
            )

    def follow(self) -> None:
        """Refresh if modules or parameters have been added to the model, removed or replaced since the last call."""
        if self._structure is None or self._structure.is_current():
            return
        models = self.models()
        if any(not isinstance(p, nn.Parameter) for model in models for p in model.parameters()):
            # For one call, FSDP1 or torch.func.functional_call has put other tensors in place of the parameters.
            for entry in self.entries:
                refuse_flat(entry.name, entry.parameter)
            return
        self._structure = Structure(models) if models else None
        now = self.current_parameters() or {}
        if models and not any(is_gathered(entry.parameter, now.get(entry.name)) for entry in self.entries):
            self.refresh()

    def models(self) -> list[nn.Module]:
        """Return the models that the layout was created for, or nothing if one of them no longer exists."""
        return [] if self._recipe is None else self._recipe.models()

    def current_parameters(self) -> dict[str, Tensor] | None:
        """Return {name: parameter} of the current model, tied ones under each of their names; None without a model."""
        model = None if self._recipe is None else self._recipe.model()
        return None if model is None else {site.name: site.tensor for site in sites(model)}

    def is_guessed(self, parameter: Tensor) -> bool:
        """Return whether the shape of a parameter decided about it, since its module is unknown."""
        return self._by_key[parameter].origin == _SHAPE_RULE

    def __str__(self) -> str:
        """Return a table in which repeated layers share a row; `table` can list each of them."""
        return self.table()

    __repr__ = __str__

    def table(self, *, every: bool = False) -> str:
        """Format the layout as text: parameter, shape, weight vectors (count × fan-in and pattern), rule or reason.

        With ``every``, repeated layers have one row each.
        """
        text = f"{table.render(self.entries, every=every)}\n\n{self.summary()}"
        return f"{text}\n\n{self.to_paste()}".rstrip()

    def to_paste(self) -> str:
        """Format the suggestions as lines under a heading; empty if there are none."""
        heading = "Rules for the unknown parameters, to paste and edit:"
        lines = [heading, *(indent(code, "  ") for code in self.suggestions)]
        return "\n".join(lines) if self.suggestions else ""

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Code to paste for the unknown parameters: one line for each kind, or a call with overrides."""
        code = dict.fromkeys(entry.suggestion for entry in self.unknown if entry.suggestion)
        return tuple(
            sorted(code, key=lambda text: "register_layout" not in text)
        )  # rules precede the layout's creation

    def summary(self) -> str:
        """Return one line with the number of centered parameters and their fraction of the elements."""
        line = _fraction_centered(self.entries, " parameters are centered")
        trained = [entry for entry in self.entries if entry.parameter.requires_grad]
        if len(trained) < len(self.entries):
            line += f"; of the trained ones, {_fraction_centered(trained, '')}"
        return line + (f"; {len(self.unknown)} skipped as unknown" if self.unknown else "")


def weight_layout(
    model: nn.Module,
    *,
    only: str = "all",
    overrides: Mapping[Selector, Rule] | None = None,
    exclude: Iterable[Selector] = (),
) -> WeightLayout:
    """Decide which elements of each of a model's parameters form one weight vector.

    The modules determine the layout, not the shapes. An override takes precedence; otherwise the rule for (class,
    parameter name) applies, looked up in the class and then in its bases. A parameter without a rule is skipped and
    reported, never guessed.

    Args:
        model: the model. If there are only its parameters, use `WeightLayout.from_parameters`.
        only: ``"all"``, or ``"conv"`` for convolutions of any dimension. This differs from ``gc_conv_only`` in the
            authors' code, which centers the parameters with more than three axes and so skips Conv1d.
        overrides: {selector: rule}, where the selector is a parameter or its name, with wildcards as in ``fnmatch``
            (``"encoder.*.weight"``) unless it is the exact name of a parameter, and the rule is a pattern such as
            ``"[i] o"`` (see `WeightVectors.parse`), `WeightVectors`, `LeaveAlone`, None (skip) or a function of
            (module, tensor). The last match applies.
        exclude: what to skip: parameters, names with or without wildcards, or modules (all of their parameters).

    Returns:
        A `WeightLayout`; print it to see the table.

    Raises:
        ValueError: ``only`` is unknown; an override or exclude matches no parameter; an override does not fit the
            shape or gives a fan-in of 1; the model is wrapped in FSDP1, which flattens its parameters.
        TypeError: model is not a module, or an override is not a rule.

    Source: Yong et al. 2020, section 3.2; theorem 4.1 tests each rule for a layer that is linear in its input.

    Examples:
        >>> import torch, gradcentral
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10))
        >>> print(gradcentral.weight_layout(net, exclude=["2.*"]))
        parameter  shape    weight vectors     decided by
        ----------------------------------------------------
        0.weight   8×3×3×3  8 × 27  o [i k k]  Conv2d.weight
        0.bias     8        –                  bias
        2.weight   10×288   –                  excluded
        2.bias     10       –                  excluded
        <BLANKLINE>
        1 of 4 parameters are centered (6.9% of the elements)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, not {type(model).__name__}; pass several models as "
            "torch.nn.ModuleList(models)"
        )
    return _layout_of([model], only, overrides, exclude)


def check_only(only: str) -> None:
    """Refuse an unknown value of the option ``only``.

    Raises:
        ValueError: it is neither "all" nor "conv".
    """
    if only not in ("all", "conv"):
        raise ValueError(f"unknown only={only!r}; choose from 'all', 'conv'")


def _layout_of(
    models: list[nn.Module],
    only: str,
    overrides: Mapping[Selector, Rule] | None,
    exclude: Iterable[Selector],
    params: Sequence[tuple[str, Tensor]] = (),
) -> WeightLayout:
    """Create a layout from models; parameters that are in none of them are decided by shape, with a warning."""
    check_only(only)
    overrides = dict(overrides or {})
    for selector, rule in overrides.items():
        check_rule(rule, f"overrides[{selector!r}]")
    if isinstance(exclude, (str, Tensor, nn.Module)):
        exclude = [exclude]
    recipe = Recipe([*map(weakref.ref, models)], only, overrides, list(exclude))
    model = recipe.model() if models else nn.ModuleList()
    assert model is not None
    recipe.check_selectors(model)
    entries = recipe.entries(model)
    in_models = {entry.parameter for entry in entries}
    guessed = [_entry_by_shape(*numbered) for numbered in enumerate(params) if numbered[1][1] not in in_models]
    if shapes := {tuple(entry.parameter.shape): None for entry in guessed if entry.vectors is not None}:
        warnings.warn(
            f"no module was found that holds the parameters of shape {', '.join(map(str, shapes))}: they are centered "
            "as rows of weights, which is wrong for embeddings and transposed layers; pass model=, or "
            "layout=WeightLayout.from_shapes(params) if this is intended",
            stacklevel=level_of_caller(),
        )
    return WeightLayout(entries, recipe if models else None, guessed)


def _entry_by_shape(position: int, named: tuple[str, Tensor]) -> Entry:
    name, tensor = named
    refuse_flat(name or f"parameter {position}", tensor)
    decision = not_centerable(tensor) or (
        apply_rule("o [i...]", nn.Module(), tensor) if tensor.ndim > 1 else too_few_axes(tensor)
    )
    vectors, reason = (None, decision.reason) if isinstance(decision, LeaveAlone) else (decision, "")
    return Entry(name or str(position), tensor, vectors, _SHAPE_RULE, reason)


def _fraction_centered(entries: Sequence[Entry], what: str) -> str:
    centered = [entry for entry in entries if entry.vectors is not None]
    counted = sum(entry.parameter.numel() for entry in entries if not is_lazy(entry.parameter))
    elements = sum(entry.parameter.numel() for entry in centered)
    percent = f" ({elements / counted:.1%} of the elements)" if counted else ""
    return f"{len(centered)} of {len(entries)}{what}{percent}"


def _named(params: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    for item in params:
        if isinstance(item, Tensor):
            yield "", item
        elif isinstance(item, dict):
            group = item["params"]
            yield from _named([group] if isinstance(group, Tensor) else group)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            yield item
        else:
            raise TypeError(
                f"params must hold tensors, (name, tensor) pairs or param groups, not {type(item).__name__}"
            )
