"""From a model to parameter groups: which parameters are regularised and which are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .options import check_toward, finite_and_not_negative
from .scale_invariance import scale_invariant_parameters
from .structure import Channels
from .structure.coupled_rows import coupled_rows

# Layers whose "weight" is a weight whatever its shape, as of a layer with one output.
_WEIGHT_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)


_Kind = tuple[set[nn.Parameter], dict[str, Any]]
"""Parameters, and the options of their group."""


def param_groups(
    model: nn.Module,
    *,
    l1: float = 1e-5,
    weight_decay: float = 1e-4,
    exclude: str | Sequence[str] = (),
    include: str | Sequence[str] = (),
    toward: str = "zero",
    new: str | Sequence[str] = (),
    group_lasso: float = 0.0,
    example_inputs: Any = None,
    sets: Channels | None = None,
    importance: Mapping[str, Tensor] | None = None,
    min_keep: float = 0.0,
    groups: str = "channels",
) -> list[dict[str, Any]]:
    r"""Splits a model's parameters into a regularised and an unregularised group.

    Weights get ``l1`` and ``weight_decay``. These get ``l1=0`` and ``weight_decay=0``, as shrinking
    them takes a layer's scale, slope or offset away and saves nothing:

    - the parameters of normalisation layers: any module whose class name holds "norm";
    - biases: "bias" is a word of the name, as in ``in_proj_bias``;
    - scales, slopes and tokens, told by shape: at most one axis is longer than 1, as in (C,),
      (C, 1, 1) or (1, 1, C), or there are three or more axes and the first has length 1, which is
      that of the batch, as in a ViT's position embedding of (1, N, C). So are PReLU's slopes,
      ConvNeXt's ``layer_scale``, CLIP's ``logit_scale``, ReZero's ``alpha`` and class tokens. The
      ``weight`` of torch's linear, convolutional, recurrent, attention and embedding layers, or of
      a class derived from them, is a weight in any shape;
    - what the model itself names: by a method ``no_weight_decay()``, as timm's models have, or by
      an attribute ``_no_weight_decay`` of the parameter, as Mamba's have;
    - what ``exclude`` names.

    ``include`` names parameters that are regularised in spite of all this, but for ``exclude``.

    To fine-tune a pretrained model, ``toward="start"`` pulls its weights towards where training
    starts instead of towards zero. Weights of layers that are new, and start at random, are to be
    named by ``new``: they are pulled towards zero, in a group of their own. With ``group_lasso``
    that is so for norms and biases too, as their elements belong to channels.

    Never regularised is a parameter whose length a parametrization divides out, such as the
    direction v of weight normalisation, g·v/\|v\|, or the weight below spectral normalisation: v
    would come to exactly 0, and the weight to 0/0. Weight normalisation's magnitude g stands for
    the weight instead. Parametrizations of ``torch.nn.utils.parametrize`` are tried out on a copy,
    torch's own and others: what they make of a parameter v doesn't change when v is doubled. The
    older ``torch.nn.utils.weight_norm`` and ``spectral_norm`` are told by their class.

    With ``group_lasso`` whole channels are penalised, those that :func:`resnet_reg_ext.channels`
    finds: rows of convolutions and linear layers with the elements of norms that belong to them,
    whether they are in the regularised group or not. Both groups get ``group_lasso``, ``rows``,
    equal integers for parameters whose rows are coupled, and ``row_weights``, the a_g of each
    channel g. Sets with a parameter that ``exclude`` names are left out. a_g is √n_g, n_g being the
    number of elements of a channel; or, with scores s_g in ``importance``, c·‖w_g‖/s_g with the c
    that leaves Σ a_g·‖w_g‖ as large (the adaptive lasso of Zou, 2006). The channels that go first
    are those of the smallest ‖w_g‖/a_g, so with scores those that matter least.

    With ``groups="norms"`` a group is a channel's elements of the norms alone,

    .. math:: \lVert w_g \rVert^2 = \sum_{j} \gamma_{j,g}^2 + \beta_{j,g}^2,

    which are the weights and biases of the norms j of its set. Behind a batch norm a channel is
    gone when these are zero, whatever the convolution's row is; so the rows are in no group, and
    keep ``l1`` and ``weight_decay``. Sets with a path that has no norm are left out. Source: Liu et
    al., *Learning efficient convolutional networks through network slimming*, 2017, with these
    groups in place of an l1 on the weights.

    A parameter that is used in several places is in one group, the unregularised one if any of its
    places is. Frozen parameters are included; an optimizer passes over them until they have a
    gradient.

    Args:
        model: any module.
        l1: coefficient for the regularised group.
        weight_decay: coefficient for the regularised group.
        exclude: a shell-style pattern of full parameter names, such as ``"fc.*"``, or several.
        include: the same, for parameters to regularise that would not be.
        toward: the regularised group's option: ``"zero"`` or ``"start"``.
        new: the same as ``exclude``, for parameters that aren't pretrained; with
            ``toward="start"`` only.
        group_lasso: coefficient of the group lasso on channels, for all groups; with
            ``toward="start"`` of a channel's distance from its start, so that whole channels stay
            exactly what they were. Needs ``example_inputs`` and
            ``pip install 'resnet_reg_ext[compact]'``.
        example_inputs: what one forward pass takes, as for :func:`resnet_reg_ext.channels`.
        sets: instead of it what :func:`resnet_reg_ext.channels` returned for this model.
        importance: with ``group_lasso`` scores of the channels, >= 0, by the set's name, as
            :func:`resnet_reg_ext.importance` returns; of ``"taylor"`` the roots, which grow in
            proportion to a channel's part in the loss. None for a_g = √n_g.
        min_keep: with ``group_lasso`` the fraction of each set's channels, in [0, 1), that isn't
            penalised (a_g = 0), so that no layer can be lost: those of the highest scores, or of
            the largest norms (default: 0).
        groups: with ``group_lasso`` what a group consists of: ``"channels"``, all rows and elements
            of a channel, or ``"norms"``, its norms' weights and biases.

    Returns:
        One to four groups with (name, parameter) pairs, for :class:`resnet_reg_ext.ProxSGD`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no parameters, a pattern matches none of their names, there are
            no channels for ``group_lasso``, ``importance`` lacks a set or has scores that aren't
            usable, ``min_keep`` is out of its range, ``groups`` or ``toward`` is neither of the
            two, or ``toward`` is ``"zero"`` with ``new``.
        ImportError: ``group_lasso`` is given, and torch-pruning isn't installed.

    Warns:
        UserWarning: a parametrization can't be tried out; its parameters are told by name and
            shape. Or a set of channels isn't penalised, as a channel of it is more or less than one
            row of each parameter, or has a path without a norm with ``groups="norms"``.

    Example:
        >>> optimizer = ProxSGD(param_groups(model, l1=1e-5, weight_decay=1e-4), lr=0.1)
        >>> groups = param_groups(model, toward="start", new="fc.*")  # to fine-tune
    """
    _check_model(model)
    lasso = finite_and_not_negative(group_lasso, "param_groups: group_lasso")
    _check_toward(toward, new)
    _check_for_lasso(lasso, importance, min_keep, groups)
    given = {"exclude": exclude, "include": include, "new": new}
    excluded, included, unpretrained = every = [_Patterns(*one) for one in given.items()]
    names: dict[nn.Parameter, str] = {}
    never, unless_included, wanted = scale_invariant_parameters(model), set(), set()
    without_start: set[nn.Parameter] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    named_by_model = _names_without_weight_decay(modules)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, name)
        if excluded.match(name):
            never.add(parameter)
        if included.match(name):
            wanted.add(parameter)
        if unpretrained.match(name):
            without_start.add(parameter)
        if name in named_by_model or not _is_weight(name, parameter, modules):
            unless_included.add(parameter)
    if not names:
        raise ValueError("param_groups: the model has no parameters")
    for patterns in every:
        patterns.check_all_matched()
    unregularised = never | (unless_included - wanted)
    none, both = {"l1": 0.0, "weight_decay": 0.0}, {"l1": l1, "weight_decay": weight_decay}
    kinds = [(unregularised, none), (set(names), both)]
    if toward == "start":
        # With a group lasso, norms and biases have rows of channels.
        kinds = _towards_start(kinds, without_start, 0 if lasso > 0 else 1)
    split = _by_kind(names, kinds)
    if lasso > 0:
        options: dict[str, Any] = {"sets": sets, "importance": importance, "min_keep": min_keep}
        coupled = coupled_rows(model, example_inputs, excluded.matched, groups=groups, **options)
        _couple(split, lasso, *coupled)
    return split


def _couple(
    groups: Sequence[dict[str, Any]],
    group_lasso: float,
    rows: Mapping[str, int],
    weights: Mapping[str, Any],
) -> None:
    """Gives groups the options of the group lasso; ``rows`` and ``weights`` are by name."""
    for group in groups:
        names = [name for name, _ in group["params"]]
        group["group_lasso"] = group_lasso
        group["rows"] = [rows.get(name) for name in names]
        group["row_weights"] = [weights.get(name) for name in names]


def _check_for_lasso(group_lasso: float, importance: Any, min_keep: float, groups: str) -> None:
    """Refuses unknown groups, and what would have no effect without a group lasso."""
    if groups not in ("channels", "norms"):
        raise ValueError(f"param_groups: groups is {groups!r}: must be 'channels' or 'norms'")
    if group_lasso == 0 and (importance is not None or min_keep or groups != "channels"):
        raise ValueError(
            "param_groups: importance, min_keep and groups are for group_lasso, which is 0: give "
            "one above"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups: model is a {type(model).__name__}: must be a module, whose layers tell "
            "which parameters to regularise"
        )


def _towards_start(
    kinds: Sequence[_Kind], without_start: set[nn.Parameter], first: int
) -> list[_Kind]:
    """Divides kinds from the ``first`` on by what their penalties pull towards."""
    result = list(kinds[:first])
    for kind, options in kinds[first:]:
        result.append((kind & without_start, {**options, "toward": "zero"}))
        result.append((kind, {**options, "toward": "start"}))
    return result


def _by_kind(
    names: Mapping[nn.Parameter, str],
    kinds: Sequence[_Kind],
) -> list[dict[str, Any]]:
    """A group of each kind's parameters, where it has any; the first kind's comes last.

    Args:
        names: all parameters.
        kinds: parameters and the options of their group; a parameter is of the first that has it.
    """
    groups: list[dict[str, Any]] = []
    taken: set[nn.Parameter] = set()
    for kind, options in kinds:
        members = [(n, p) for p, n in names.items() if p in kind and p not in taken]
        taken |= kind
        if members:
            groups.insert(0, {"params": members, **options})
    return groups


def _check_toward(toward: str, new: str | Sequence[str]) -> None:
    """Refuses a ``toward`` that is none, or that another argument contradicts."""
    check_toward(toward, "param_groups: ")
    if toward == "zero" and new:
        raise ValueError(
            f"param_groups: new is {new!r} with toward='zero': all weights are pulled towards zero "
            "then; it needs toward='start'"
        )


class _Patterns:
    """Shell-style patterns of parameter names that must each match one."""

    def __init__(self, argument: str, patterns: str | Sequence[str]) -> None:
        self._argument = argument
        self._patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self._unmatched = set(self._patterns)
        self.matched: set[str] = set()
        """The names that a pattern has matched."""

    def match(self, name: str) -> bool:
        matching = [pattern for pattern in self._patterns if fnmatchcase(name, pattern)]
        self._unmatched.difference_update(matching)
        if matching:
            self.matched.add(name)
        return bool(matching)

    def check_all_matched(self) -> None:
        if self._unmatched:
            raise ValueError(
                f"param_groups: {self._argument} matches no parameter: {sorted(self._unmatched)}"
            )


def _is_weight(name: str, parameter: nn.Parameter, modules: dict[str, nn.Module]) -> bool:
    """Whether this place of a parameter, by its module, name and shape, is that of a weight."""
    path = name.split(".")
    leaf = path[-1]
    owner = modules[".".join(path[:-1])]
    if "parametrizations" in path[:-2]:
        # "layer.parametrizations.weight.original0" is judged as "layer.weight". A parameter of the
        # parametrization itself, "layer.parametrizations.weight.0.scale", is judged as what it is
        # there, but nothing of a bias or of a norm is a weight.
        at = path.index("parametrizations")
        target, layer = path[at + 1], modules[".".join(path[:at])]
        if _is_bias_or_norm(target, layer):
            return False
        if len(path) == at + 3:
            leaf, owner = target, layer
    if getattr(parameter, "_no_weight_decay", False) or _is_bias_or_norm(leaf, owner):
        return False
    if isinstance(owner, _WEIGHT_LAYERS) and "weight" in leaf.split("_"):
        return True
    # A lazy module's parameter has no shape yet, and the one flat parameter that FSDP makes of many
    # (use_orig_params=False) has lost theirs.
    if is_lazy(parameter) or getattr(parameter, "_is_flat_param", False):
        return True
    is_vector = sum(size > 1 for size in parameter.shape) <= 1
    is_broadcast_over_the_batch = parameter.ndim >= 3 and parameter.shape[0] == 1
    return not is_vector and not is_broadcast_over_the_batch


def _is_bias_or_norm(leaf: str, module: nn.Module) -> bool:
    return "bias" in leaf.split("_") or "norm" in type(module).__name__.lower()


def _names_without_weight_decay(modules: dict[str, nn.Module]) -> set[str]:
    """Full names that the modules' own ``no_weight_decay()`` gives, which may be patterns."""
    found: set[str] = set()
    for prefix, module in modules.items():
        method = getattr(module, "no_weight_decay", None)
        if callable(method):
            patterns = tuple(method())
            for name, _ in module.named_parameters(remove_duplicate=False):
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    found.add(f"{prefix}.{name}" if prefix else name)
    return found
