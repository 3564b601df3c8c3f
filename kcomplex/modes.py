"""The training modes by class name: ``kcomplex.modes.MoMos(block_size=4)``, third-party ones included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kcomplex.errors import PluginError
from kcomplex.registry import registry

if TYPE_CHECKING:
    from kcomplex.training.baseline import Baseline as Baseline
    from kcomplex.training.codeq import CoDeQ as CoDeQ
    from kcomplex.training.drr import DRR as DRR
    from kcomplex.training.fpp import FPP as FPP
    from kcomplex.training.gradual_pruning import GradualPruning as GradualPruning
    from kcomplex.training.hashed_sharing import HashedSharing as HashedSharing
    from kcomplex.training.layerwise import Layerwise as Layerwise
    from kcomplex.training.lottery_ticket import LotteryTicket as LotteryTicket
    from kcomplex.training.low_rank import LowRank as LowRank
    from kcomplex.training.momos import MoMos as MoMos
    from kcomplex.training.pmmp import PMMP as PMMP
    from kcomplex.training.relaxed_l1 import RelaxedL1 as RelaxedL1
    from kcomplex.training.uniform_qat import UniformQAT as UniformQAT


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
