"""What an evaluation and a clustering of a loaded encoder begin with: its images, the device and the number format."""

from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from twoviews.config.recorded import recorded_runtime
from twoviews.console import Console
from twoviews.data.images import ImageData
from twoviews.encoders.loaded import LoadedEncoder
from twoviews.fallbacks import slower
from twoviews.foreign import errors_naming
from twoviews.protocols.protocol import EvaluationContext
from twoviews.unseen_pixels import unseen_pixels_note


def prepare_evaluation(
    loaded: LoadedEncoder,
    chosen_data: Callable[[], ImageData] | None,
    cfg: DictConfig,
    overrides: Sequence[str],
    console: Console,
) -> EvaluationContext:
    """The context that an encoder is evaluated in; the user is told how its images are prepared and what is slow.

    Args:
        loaded: the encoder.
        chosen_data: loads the images of the command line; None: those of the run.
        cfg: the checked configuration of evaluate.py or cluster.py.
        overrides: of the command line.
        console: to print to.

    Raises:
        BadInput: the images cannot be loaded, or the encoder cannot take them.
    """
    with errors_naming(loaded.config_path):
        runtime, runtime_notes = recorded_runtime(cfg, loaded.config, overrides)
    device = runtime.torch_device()
    runtime.configure_evaluation(device)
    data = loaded.load_data(chosen_data).to(device)
    unseen = unseen_pixels_note(loaded.encoder, loaded.preprocessing.channels, loaded.preprocessing.image_size)
    for note in (*loaded.notes, *([unseen] if unseen else []), *runtime_notes, *data.notes):
        console.say(note)
    for sentence in slower(runtime.device, device):
        console.say_once(sentence)
    if chosen_data is None and not loaded.trained_on(data):
        console.say("warning: these are not the images of the run (their digest differs), so the numbers are not its.")
    dtype = runtime.evaluation_dtype(device)
    own = {"head": loaded.head, "title": loaded.title}
    return EvaluationContext(loaded.encoder.to(device), data, device, dtype, runtime.channels_last, **own)
