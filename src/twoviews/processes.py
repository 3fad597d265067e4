"""The environment variables by which torchrun numbers processes, some of which other launchers set as well."""

import os
import sys

from twoviews.errors import BadInput

REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # without all of these this is a single process
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return int(os.environ.get("RANK") or 0)


def drop_incomplete_variables(command: str, sweep: bool) -> None:
    """Remove the variables of torchrun from the environment if they are incomplete, so that this is a single process.

    Args:
        command: train, evaluate or cluster.
        sweep: whether the command launches a sweep.

    Raises:
        BadInput: a variable is out of range, or the command runs in one process only.
    """
    variables = {name: os.environ[name] for name in PLACE if name in os.environ}
    missing = [name for name in REQUIRED if not os.environ.get(name)]
    if not variables:
        return
    if missing:
        for name in variables:
            del os.environ[name]
        if any(value not in ("0" if "RANK" in name else "1") for name, value in variables.items()):
            listed = ", ".join(f"{name}={value}" for name, value in variables.items())
            print(
                f"{listed} of the environment without {' and '.join(missing)}: this is a single process; for several use "
                "torchrun.",
                file=sys.stderr,
            )
        return
    processes = _number("WORLD_SIZE", 1, None)
    _number("RANK", 0, processes - 1)
    _number("LOCAL_RANK", 0, processes - 1)
    _number("LOCAL_WORLD_SIZE", 1, processes)
    _number("MASTER_PORT", 1, 2**16 - 1)
    if processes > 1 and sweep:
        raise BadInput(
            f"a sweep is launched by one process, and WORLD_SIZE={processes}; leave out torchrun or unset WORLD_SIZE, and give "
            "each job several processes by hydra/launcher=slurm_ddp."
        )
    if processes > 1 and command != "train":
        raise BadInput(
            f"{command}.py is one process, and WORLD_SIZE={processes}; leave out torchrun, or unset WORLD_SIZE."
        )


def _number(name: str, least: int, most: int | None) -> int:
    """The number in an environment variable; `least` if it is not set."""
    value = os.environ.get(name, str(least))
    if value.isdecimal() and least <= int(value) and (most is None or int(value) <= most):
        return int(value)
    os.environ.pop("RANK", None)  # of several processes only the first prints, and who that is is not known here
    limit = f"at least {least}" if most is None else f"from {least} to {most}"
    raise BadInput(
        f"{name}={value} of the environment is no number {limit}; start several processes by torchrun, or unset {name}."
    )
