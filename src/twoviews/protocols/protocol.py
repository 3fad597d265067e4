"""The contract of a protocol: one way of judging an encoder, the same in train.py and in evaluate.py."""

from twoviews.features import Judged


class Protocol:
    """Abstract: an encoder with labelled images in, numbers by name out (accuracies in percent).

    `every_epochs` says how often training measures it in passing; 0 is at the end only.
    """

    every_epochs: int

    def __call__(self, judged: Judged) -> dict[str, float]:
        """The numbers; the encoder and its mode are left as they were."""
        raise NotImplementedError
