"""The protocol of training modes: one loop drives every mode and knows none of them."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from kcomplex.errors import SpecError
from kcomplex.estimators.spec import spec_of

ParameterGroups = list[dict[str, Any]]
Evaluate = Callable[[], float]
# Module, name of its parameter, full name.
Place = tuple[nn.Module, str, str]

# The parameters of these names in these layers are what a mode works on by default.
WEIGHT_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.MultiheadAttention,
)
WEIGHT_NAMES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Mode(ABC):
    """A training mode: a frozen configuration, bound to one model by `prepare`.

    A loop calls, in this order::

        mode.prepare(model)
        optimizer = AdamW(mode.parameter_groups(lr=1e-3))
        for each epoch:
            for each batch:
                (loss(model(x), y) + mode.penalty()).backward(); optimizer.step(); mode.after_step()
            mode.after_epoch()
        mode.begin_fine_tuning(evaluate)      # optional: prunes; further epochs fine-tune what is left
        plain = mode.convert(model)

    Every method but `prepare` and `convert` may do nothing. What a mode keeps between calls (companions of the
    weights, banks of motifs) is in `state_dict` and comes back with `load_state_dict`. A mode whose parameters are out
    of range is refused with a SpecError when it is made.

    Where a mode has ``include`` and ``exclude``, they say which parameters it works on; see `chosen_parameters`. By
    default those are the weights of linear, convolution, embedding and attention layers.
    """

    name: ClassVar[str]

    @property
    def spec(self) -> str:
        """Specification string that builds this mode's configuration again."""
        return spec_of(self)

    def with_samples(self, samples: int) -> Mode:
        """Return the mode with the number of training samples, where it asks for one to price parameters in bits."""
        if getattr(self, "samples", samples) is None:
            return dataclasses.replace(self, samples=samples)  # type: ignore[call-arg]
        return self

    def prepare(self, model: nn.Module) -> None:
        """Attach the mode to a model, in place; where that fails, another model can be tried.

        Raises
        ------
        SpecError
            The mode is already attached to a model, or the model has nothing that it could work on.
        """
        if self.attached:
            raise SpecError(f"the mode {self.name!r} is already attached to a model: make a new one for each model")
        # The configuration is frozen; what a mode is attached to isn't part of it (nor of equality and repr).
        self.__dict__.update(_state=self.attach(model), _model=model)

    @abstractmethod
    def attach(self, model: nn.Module) -> Any:
        """Change a model as the mode needs it, and return what the mode keeps of it; for `prepare`."""

    def parameter_groups(self, lr: float, weight_decay: float = 0.0) -> ParameterGroups:
        """Return parameter groups for any optimiser, the mode's own parameters included.

        Parameters
        ----------
        lr, weight_decay
            For the model's weights; a mode's own groups may have their own.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return [{"params": parameters, "lr": lr, "weight_decay": weight_decay}]

    def penalty(self) -> torch.Tensor:
        """Return the term to add to the training loss: a scalar in nats a sample, differentiable."""
        return torch.zeros((), device=next(self.model.parameters()).device)

    def after_step(self) -> None:
        """Do what the method does after every optimiser step."""

    def after_epoch(self) -> None:
        """Do what the method does after every epoch, before validation."""

    def settled(self) -> bool:
        """Return whether the regularised phase may end before its time (see `kcomplex.training.protocol.schedule`)."""
        return True

    def steady(self) -> bool:
        """Return whether the penalty is what it will stay: objectives with another one aren't compared with it."""
        return True

    def least_epochs(self) -> int:
        """Return how many regularised epochs there must be for the mode to do what its configuration says."""
        return 0

    def begin_fine_tuning(self, evaluate: Evaluate, error: Evaluate | None = None) -> None:
        """End the regularised phase and prune; from here on `penalty` is zero and what was pruned stays pruned.

        Parameters
        ----------
        evaluate
            Returns the loss on held-out data in nats, which says what can go.
        error
            Returns the share of mistakes on held-out data, for modes that go by accuracy.

        Notes
        -----
        A sequence of modes has more `parameter_groups` from here on.
        """

    def convert(self, model: nn.Module) -> nn.Module:
        """Return a plain copy of the model that holds exactly the compressed weights; the model isn't changed."""
        plain = copy.deepcopy(model)
        with torch.no_grad():
            _remove_parametrisations(plain)
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Return what the mode keeps besides the model's own parameters: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, after `prepare`.

        Raises
        ------
        KComplexError
            The state belongs to another model, or to another configuration.
        """

    def report(self) -> dict[str, float]:
        """Return numbers worth logging beside the metrics (motifs used, share of zeros ...)."""
        return {}

    @property
    def attached(self) -> bool:
        """Whether `prepare` was called."""
        return "_model" in self.__dict__

    @property
    def model(self) -> nn.Module:
        """The model that `prepare` attached this mode to; SpecError where it wasn't called yet."""
        model: nn.Module = self._kept("_model")
        return model

    @property
    def state(self) -> Any:
        """What the mode keeps of its model; SpecError where `prepare` wasn't called yet."""
        return self._kept("_state")

    def _kept(self, key: str) -> Any:
        if not self.attached:
            raise SpecError(f"the mode {self.name!r} isn't attached: call prepare(model) first")
        return self.__dict__[key]


def chosen_weights(model: nn.Module, include: Iterable[str], exclude: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that a mode works on by full name; see `chosen_parameters`."""
    chosen = chosen_parameters(model, WEIGHT_LAYERS, include, exclude)
    return {full: module.get_parameter(name) for module, name, full in chosen}


def chosen_parameters(
    model: nn.Module,
    types: tuple[type[nn.Module], ...] | None,
    include: str | Iterable[str],
    exclude: str | Iterable[str],
    parameter_names: tuple[str, ...] | None = WEIGHT_NAMES,
    parametrised: bool = False,
) -> list[Place]:
    """Return (module, parameter name, full name) of the trainable parameters that a mode works on, each one once.

    A shared parameter is returned where it comes first, and goes by all its places: it is chosen by type and parameter
    name if one of them fits, and included or excluded if a pattern matches one of its full names.

    Parameters
    ----------
    model
        Whose parameters to choose from.
    types
        Only parameters directly in modules of these types; None for every type.
    include, exclude
        Patterns, or one alone: shell-style globs on full parameter names (``*.bias``, ``conv1.weight``), on names of
        modules (``conv1``, which isn't ``layer1.conv1``), or on types of modules and their bases (``type:Embedding``,
        ``type:_BatchNorm``). An include pattern for parameter names overrides types and parameter names, one for
        modules overrides types only.
    parameter_names
        Only parameters of these names; None for every name.

    parametrised
        Choose the latent weights of parametrised ones too, under their plain names; see `latent`.

    Raises
    ------
    SpecError
        An include or exclude pattern matches no parameter, nothing is chosen, or something that isn't real floats.
    """
    include, exclude = _patterns(include), _patterns(exclude)
    places = _places(model, parametrised)
    for pattern in (*include, *exclude):
        if not any(_matches(place, pattern) for shared in places for place in shared):
            names = [full for shared in places for _, _, full in shared]
            raise SpecError(f"no trainable parameter matches {pattern!r}; there are {', '.join(names[:8])} ...")

    def named(place: Place) -> bool:
        return parameter_names is None or place[1] in parameter_names

    def wanted(place: Place) -> bool:
        if not include:
            return (types is None or isinstance(place[0], types)) and named(place)
        return any(fnmatchcase(place[2], p) or (_matches(place, p) and named(place)) for p in include)

    chosen = []
    for shared in places:
        excluded = any(_matches(place, pattern) for place in shared for pattern in exclude)
        if any(map(wanted, shared)) and not excluded:
            chosen.append(shared[0])
    if not chosen:
        raise SpecError(f"{type(model).__name__} has no parameter that the mode could work on")
    for module, name, full in chosen:
        dtype = latent(module, name).dtype
        if not dtype.is_floating_point:
            raise SpecError(f"the parameter {full!r} is {dtype}, not a real float: exclude it")
    return chosen


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _matches(place: Place, pattern: str) -> bool:
    module, _, full = place
    kind, colon, glob = pattern.partition(":")
    if colon and kind == "type":
        return any(fnmatchcase(cls.__name__, glob) for cls in type(module).__mro__)
    return fnmatchcase(full, pattern) or fnmatchcase(full.rpartition(".")[0], pattern)


def latent(module: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter of a module, or the original of one that has parametrisations."""
    parameter = module._parameters.get(name)
    if parameter is None:
        parameter = module.get_parameter(f"parametrizations.{name}.original")
    return parameter


def _places(model: nn.Module, parametrised: bool) -> list[list[Place]]:
    """Return every place of every trainable parameter that isn't empty."""
    places: dict[int, list[Place]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if parametrised and "parametrizations" in prefix.split("."):
            continue
        named = dict(module._parameters)
        if parametrised and parametrize.is_parametrized(module):
            chains = module.get_submodule("parametrizations").named_children()
            named |= {name: chain._parameters["original"] for name, chain in chains if "original" in chain._parameters}
        for name, parameter in named.items():
            if parameter is not None and parameter.requires_grad and parameter.numel():
                full = f"{prefix}.{name}" if prefix else name
                places.setdefault(id(parameter), []).append((module, name, full))
    return list(places.values())


def _remove_parametrisations(plain: nn.Module) -> None:
    """Make every parametrised tensor of a deep copy an ordinary one that holds its effective value.

    `torch.nn.utils.parametrize.remove_parametrizations` won't do: it strips the class that the copy shares with the
    model it was copied from, and it would quantise a tied weight once for every module that uses it.
    """
    kept: dict[int, nn.Parameter] = {}
    for module in list(plain.modules()):
        if not parametrize.is_parametrized(module):
            continue
        parametrisations = module.get_submodule("parametrizations")
        assert isinstance(parametrisations, nn.ModuleDict)
        parametrisations.eval()
        values = {name: getattr(module, name).detach() for name in parametrisations}
        plain_class = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        module.__class__ = plain_class
        for name, value in values.items():
            originals = list(parametrisations[name].parameters(recurse=False))
            if not originals:
                module.register_buffer(name, value)
                continue
            fresh = nn.Parameter(value, requires_grad=any(original.requires_grad for original in originals))
            module.register_parameter(name, kept.setdefault(id(originals[0]), fresh))
