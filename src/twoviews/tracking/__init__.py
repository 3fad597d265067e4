"""Metrics of a run: recorded in the run folder first, sent to MLflow second.

    metrics.py    the training logs into metrics.jsonl, which is complete without MLflow; each checkpoint makes a part of it final
    mirror.py     a process beside the training, which calls `upload` every few seconds and once more at the end
    upload.py     sends what is in the run folder and not yet in MLflow: values, description.py's words, files, status
    state.py      tracking.json: where a run is sent to, and what MLflow has of it
    client.py     MLflow's client for a tracking URI (uris.py), which may be an SQLite file (sqlite_file.py)
    __main__.py   the command line: `upload` again and later, TensorBoard, and a server (server.py)

parent_run.py has the runs of MLflow that are no trainings: sweeps and comparisons.
"""
