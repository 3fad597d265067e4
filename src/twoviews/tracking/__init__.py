"""Metrics of a run: recorded in the run folder first, sent to MLflow second.

`Metrics` writes metrics.jsonl, which is complete without MLflow. Everything that MLflow gets is in the run folder, so one
function, `upload`, serves the mirror of a training and `python -m twoviews.tracking sync` alike.
"""
