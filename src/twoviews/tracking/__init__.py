"""What a run measures: kept in its folder first, mirrored into MLflow second.

`Metrics` writes metrics.jsonl, which is the truth and works without MLflow. Everything the mirror needs lies in the
run folder, so one function, `send`, serves the thread beside the training (`Mirror`) and
`python -m twoviews.tracking sync` alike.
"""

from twoviews.tracking.metrics import NAME, Metrics, lock_for_training, read
from twoviews.tracking.mirror import Mirror, Tracking, is_child, page, run_id
from twoviews.tracking.sending import send

__all__ = [
    "NAME",
    "Metrics",
    "Mirror",
    "Tracking",
    "is_child",
    "lock_for_training",
    "page",
    "read",
    "run_id",
    "send",
]
