"""The one error a user is meant to see, and the search for the name they meant."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping


class BadInput(ValueError):
    """Something the user can put right: each message names value, limit and remedy in one sentence.

    The entry points print the messages alone, a line each, and leave with exit code 2; every other exception is a defect of
    the program and keeps its traceback. Credentials in addresses are left out of the messages.
    """

    def __init__(self, *messages: str):
        super().__init__("\n".join(map(without_secrets, messages)))

    @property
    def messages(self) -> list[str]:
        """A sentence for each mistake."""
        return str(self).splitlines()


def mistakes(*steps: Callable[[], object]) -> list[str]:
    """The messages of every BadInput that these calls raise, each message once."""
    messages: dict[str, None] = {}
    for step in steps:
        try:
            step()
        except BadInput as error:
            messages |= dict.fromkeys(error.messages)
    return [*messages]


def refuse_former_names(cls: type, names: Mapping[str, str]) -> None:
    """Refuse a class that defines what is called otherwise now, by former name: it would be ignored.

    Raises:
        BadInput: it does.
    """
    for former, name in names.items():
        if former in vars(cls):
            raise BadInput(f"{cls.__module__}.{cls.__qualname__} has {former}, which is called {name} now; rename it.")


def shown(value: object) -> str:
    """A value as it is typed in an override, on one line and not long."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else "''" if value == "" else str(value)
    text = "".join(sign if sign.isprintable() else "?" for sign in text[:101])
    return text if len(text) <= 100 else f"{text[:99]}…"


class Stopped(BaseException):
    """A signal stops the command where nothing is lost by that.

    The loop and the entry points catch it, and `Recording.finish` while it waits for MLflow.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def without_secrets(text: str) -> str:
    """A text whose addresses have "…" for what may be credentials: before an @, in a query, or where a port belongs."""
    text = re.sub(r"([A-Za-z][\w+.-]*:/+).*@", r"\1…@", text, flags=re.DOTALL)
    text = re.sub(r"(:/+[^\s?#'\"]*[?#])[^\s'\"]*", r"\1…", text)
    return re.sub(r"(://[^\s/:@\[…'\"]+:)(?!\d+\b)[^\s/'\"]+", r"\1…", text)


def printable(text: str) -> str:
    """A text that any encoding of Unicode takes: bytes of file names that are no UTF-8 are spelt out, such as \\udcfc."""
    return text.encode(errors="backslashreplace").decode()


def counted(count: float, noun: str, form: str = ",") -> str:
    """A number with its noun, in the singular for 1: "1 epoch", "2 epochs", "1,437 images", "3 classes".

    Args:
        count: how many.
        noun: in the singular.
        form: how the number is written.
    """
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:{form}} {noun}{ending}"


def nearest(name: str, names: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of `names`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.55)
    return f" Did you mean '{close[0]}'?" if close else ""


def system_reason(error: OSError) -> str:
    """What the operating system says, as part of a sentence."""
    return (error.strerror or str(error) or type(error).__name__).lower()
