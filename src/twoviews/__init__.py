"""Contrastive and self-supervised learning of image encoders.

    import twoviews
    encoder = twoviews.load("latest")
    x = encoder.features("photos")

Trainings are started by train.py, with a configuration of Hydra.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twoviews.api import PretrainedEncoder, load

__all__ = ["PretrainedEncoder", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("PretrainedEncoder", "load"):  # torch is imported when it is needed, not by train.py --help
        from twoviews import api

        return getattr(api, name)
    raise AttributeError(f"module 'twoviews' has no attribute {name!r}")
