"""The encoder of a run followed by its projector, whose outputs the method's loss compares."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from twoviews.backbones import Encoder
from twoviews.checkpoints import load_checkpoint
from twoviews.config.building import build
from twoviews.encoder_file import check_finite
from twoviews.encoders.loaded import LoadedEncoder
from twoviews.errors import BadInput
from twoviews.foreign import short

PREFIX = "projector."


class Projected(Encoder):
    """An encoder and a projector that takes its features."""

    def __init__(self, encoder: Encoder, projector: nn.Module, out_dim: int, recipe: dict[str, Any]):
        super().__init__()
        self.encoder, self.projector, self.out_dim, self.recipe = encoder, projector, out_dim, recipe

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Projections [B, out_dim], not normalized."""
        return self.projector(self.encoder(images))


def projected(loaded: LoadedEncoder) -> Projected:
    """The encoder of a run followed by the projector of its last checkpoint.

    Raises:
        BadInput: it is no encoder of a run, the method has no projector, or the checkpoint is gone.
    """
    run = loaded.run
    if run is None or loaded.head is not None:
        raise BadInput(f"feature=projection needs a run, and {loaded.name} is a network alone; use feature=backbone.")
    path = run.folder / "last.pt"
    if not path.exists():
        raise BadInput(f"feature=projection needs {path}, which holds the projector and is gone; use feature=backbone.")
    try:
        state = load_checkpoint(path)["method"]
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({str(error).splitlines()[0]}); use feature=backbone.") from error
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    if not weights:
        raise BadInput(f"the method of {run.folder} has no projector; use feature=backbone.")
    projector = build(loaded.config["method"], encoder=loaded.encoder).projector
    try:
        check_finite(weights)
        projector.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"{path} holds no projector for {run.folder} ({short(error)}); use feature=backbone.") from error
    last = next(module for module in reversed(list(projector.modules())) if isinstance(module, nn.Linear))
    return Projected(loaded.encoder, projector, last.out_features, loaded.encoder.recipe)
