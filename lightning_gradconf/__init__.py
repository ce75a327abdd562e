"""Are my gradients fighting each other? Gradient confusion for PyTorch Lightning.

Gradient confusion (Sankararaman et al. 2020, https://arxiv.org/abs/1904.06963) is the worst conflict between the
gradients of different samples. Add `GradientConfusionCallback` to a Trainer to log it beside loss and accuracy,
without changing the run; or call `gradient_gram` and `gradient_statistics` in a loop of your own. Everything is a
function of one matrix, the inner products of the gradients.
"""

from typing import TYPE_CHECKING, Any

from lightning_gradconf.gram.select import gradient_gram
from lightning_gradconf.metric import GradientConfusion
from lightning_gradconf.statistics import gradient_statistics

if TYPE_CHECKING:
    from lightning_gradconf.callback import GradientConfusionCallback

__version__ = "0.1.0"
__all__ = ["GradientConfusion", "GradientConfusionCallback", "gradient_gram", "gradient_statistics"]


def __getattr__(name: str) -> Any:
    # On demand: everything but the callback works without Lightning.
    if name == "GradientConfusionCallback":
        from lightning_gradconf.callback import GradientConfusionCallback

        return GradientConfusionCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
