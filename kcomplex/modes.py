"""The training modes by class name: ``kcomplex.modes.MoMos(block_size=4)``, third-party ones included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kcomplex.errors import PluginError
from kcomplex.registry import registry

if TYPE_CHECKING:
    from kcomplex.training.baseline import Baseline as Baseline
    from kcomplex.training.pruning.drr import DRR as DRR
    from kcomplex.training.pruning.fpp import FPP as FPP
    from kcomplex.training.pruning.gradual_pruning import GradualPruning as GradualPruning
    from kcomplex.training.pruning.layerwise import Layerwise as Layerwise
    from kcomplex.training.pruning.lottery_ticket import LotteryTicket as LotteryTicket
    from kcomplex.training.pruning.pmmp import PMMP as PMMP
    from kcomplex.training.pruning.relaxed_l1 import RelaxedL1 as RelaxedL1
    from kcomplex.training.quantising.codeq import CoDeQ as CoDeQ
    from kcomplex.training.quantising.uniform_qat import UniformQAT as UniformQAT
    from kcomplex.training.sharing.hashed_sharing import HashedSharing as HashedSharing
    from kcomplex.training.sharing.low_rank import LowRank as LowRank
    from kcomplex.training.sharing.momos import MoMos as MoMos


def __getattr__(name: str) -> Any:
    """Return the mode class of this name among the entry points ``kcomplex.modes``."""
    modes = registry("kcomplex.modes")
    broken = []
    for key in modes.names():
        try:
            cls = modes.load(key)
        except PluginError as error:
            broken.append(str(error))
            continue
        if cls.__name__ == name:
            return cls
    raise AttributeError("; ".join([f"kcomplex.modes has no {name!r}; known: {', '.join(modes.names())}", *broken]))
