"""From the command line to checked values and built parts: every mistake becomes one sentence that names the remedy.

The signature of what a group builds is the schema of its YAML: names, types and ranges stand there once.

    entry.py         a command: the steps below, then main(cfg, folder) of train.py and its like; exit codes
    command_line.py  words that Hydra would misunderstand, and what is wrong with those that it refuses
    composition.py   Hydra makes the configuration from the files of conf/ (groups.py) and the overrides
    checks.py        compares each value with the signature of the class that it goes to
    building.py      `build(cfg.method, ...)` makes the object; what it refuses is told by keys (parameter_names.py)

values.py turns a configuration into plain dictionaries, digest.py names a run by its values, fitting.py adapts some to the
data, recorded.py reads those of runs.
"""
