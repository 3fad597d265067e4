"""Entry points: a command with its configuration, messages and exit codes."""

import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from twoviews import foreign, processes
from twoviews.config.checks import ROOTS, check
from twoviews.config.command_line import MULTIRUN_FLAGS, check_arguments, diagnose, hydra_arguments
from twoviews.config.composition import VERSION_BASE, register_resolvers
from twoviews.config.groups import CONF
from twoviews.config.hydra_internals import hide_classes, start_faster
from twoviews.config.parameter_names import qualify
from twoviews.config.recorded import add_missing_runtime
from twoviews.errors import BadInput, Stopped, shown, without_secrets
from twoviews.figures import set_formats
from twoviews.files import file_error

BAD_INPUT = 2  # exit code for mistakes that the user can correct
SIGNAL_EXIT_BASE = 128  # plus the signal's number: exit code of a run that was stopped and can be continued

_LESS_MEMORY = {
    "train": "find_batch=true finds the largest batch_size that fits",
    "evaluate": "close other programs, or choose other protocols",
    "cluster": "close other programs, or cluster fewer images",
}
_AFTER_CTRL_C = {
    "train": "goes on from the last checkpoint",
    "evaluate": "begins again; the numbers of protocols that had finished are stored",
    "cluster": "begins again",
}


def entry(name: str) -> Callable[[Callable[[DictConfig, Path], int | None]], Callable[[], None]]:
    """A command that calls main(cfg, folder) with the checked configuration, of conf/<name>.yaml, and the run folder.

    BadInput and errors of Hydra are printed in one sentence for each mistake, with exit code 2; other exceptions are defects
    and keep their traceback. A number returned by main becomes the exit code.
    """

    return lambda main: _Command(name, main).run


class _Command:
    """Runs one entry point; see `entry`."""

    def __init__(self, name: str, main: Callable[[DictConfig, Path], int | None]):
        self.name, self.main = name, main
        self.exit_codes: list[int] = []
        self.composed = False  # whether Hydra has called `run_composed`

    def run(self) -> None:
        """Read sys.argv, run, and leave with the exit code."""
        # Hydra would print its own message and exit with 1; this makes it raise instead.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        # Threads that spin while they wait for one that lost its core to another program make a step several times
        # slower on a busy machine; waiting asleep costs some per cent on an idle one. Read when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # argparse refuses overrides on both sides of -m, so flags go first.
        sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in MULTIRUN_FLAGS)
        self.exit_codes, self.composed = [], False
        register_resolvers()
        start_faster(sys.argv[1:])
        hide_classes()
        try:
            processes.drop_incomplete_variables(self.name, sweep=not MULTIRUN_FLAGS.isdisjoint(sys.argv[1:]))
            check_arguments(self.name, sys.argv[1:])
            sys.argv[1:] = hydra_arguments(self.name, sys.argv[1:])
            hydra.main(**VERSION_BASE, config_path=str(CONF), config_name=self.name)(self.run_composed)()
        except BadInput as error:
            self._refuse(*error.messages)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            if self.composed and not isinstance(error, (HydraException, OmegaConfBaseException)):
                raise
            self._refuse(*self._sentences(error))
        except BrokenPipeError:  # the reader of `train.py --help | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.exit_codes.append(SIGNAL_EXIT_BASE + signal.SIGPIPE)
        except OSError as error:
            self._refuse(_file_error(error))
        except KeyboardInterrupt:
            print(f"interrupted; the same command {_AFTER_CTRL_C[self.name]}.", file=sys.stderr)
            self.exit_codes.append(SIGNAL_EXIT_BASE + signal.SIGINT)
        sys.exit(max(self.exit_codes, default=0))

    def run_composed(self, cfg: DictConfig) -> None:
        """Called by Hydra with each configuration that it has composed: one or, by evaluate.py -m or cluster.py -m, several.

        The jobs of a sweep of train.py are processes of their own (sweeps/runner.py).

        Errors that the user can correct are not raised through Hydra, which would print the command around them and leave
        out the configurations that follow.
        """
        self.composed = True
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            self._check_and_run(cfg, folder)
        except Stopped as stopped:
            if processes.rank() == 0:
                print("stopped before the training began; the same command begins again.", file=sys.stderr)
            sys.exit(SIGNAL_EXIT_BASE + stopped.number)
        except BadInput as error:
            root = [field.name for field in fields(ROOTS[self.name])]
            self._refuse(*(qualify(message, root=root) for message in error.messages))
        except OSError as error:
            self._refuse(_file_error(error))
        except (MemoryError, RuntimeError) as error:
            from twoviews.data.decoding import worker_trouble
            from twoviews.memory import ran_out

            if ran_out(error):
                self._refuse(f"the memory does not suffice ({shown(error)}); {_LESS_MEMORY[self.name]}.")
            elif isinstance(error, RuntimeError) and (sentence := worker_trouble(error)):
                self._refuse(qualify(sentence))
            else:
                raise
        finally:
            _remove_if_empty(folder)

    def _check_and_run(self, cfg: DictConfig, folder: Path) -> None:
        """Check the configuration and call `main`."""
        if self.name == "train" and "method" not in HydraConfig.get().runtime.choices:  # read from a run's config.yaml
            add_missing_runtime(cfg)
        check(self.name, cfg)
        set_formats(**cfg.get("pictures", {}))
        if self.name == "train":  # the other commands read no folder of this name
            foreign.refuse_links(folder)
        _load_torch()
        self.exit_codes.append(self.main(cfg, folder) or 0)
        if self.exit_codes[-1] >= SIGNAL_EXIT_BASE:
            sys.exit(self.exit_codes[-1])  # Hydra must not begin with the next configuration

    def _sentences(self, error: Exception) -> list[str]:
        """What is wrong with sys.argv, without values that may hold a password, however they are quoted."""
        sentences = diagnose(self.name, sys.argv[1:], error)
        for argument in sys.argv[1:]:
            if "://" in argument or "tracking.uri" in argument:
                hidden = f"{argument.partition('=')[0]}=…"
                sentences = [sentence.replace(argument, hidden) for sentence in sentences]
        return sentences

    def _refuse(self, *messages: str) -> None:
        """Print the messages and record the exit code for bad input."""
        if processes.rank() == 0:  # all processes of torchrun find the same mistakes
            for message in messages:
                print(f"error: {without_secrets(message)}", file=sys.stderr)
        self.exit_codes.append(BAD_INPUT)


def _load_torch() -> None:
    """Import torch without the garbage collector, which would look through hundreds of thousands of objects that stay."""
    if "torch" in sys.modules:
        return
    if sys.stdout.isatty():
        print("loading torch …", flush=True)  # some seconds, in which a person would see nothing
    gc.disable()
    try:
        import torch  # noqa: F401

        gc.freeze()  # nor will it look through them during the training
    finally:
        gc.enable()


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder that Hydra made before the configuration was checked, unless a run has written to it."""
    for empty in (folder, Path("outputs").resolve()):
        if empty != Path.cwd() and empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()


def _file_error(error: OSError) -> str:
    """A sentence for an error of the file system that a user can correct; any other is a defect and is raised again."""
    remedy = "choose another folder with hydra.run.dir= or data.cache=; checkpoints that were written are intact"
    sentence = file_error(error, "the run folder or the cache", remedy)
    if sentence is None:
        raise error
    return sentence
