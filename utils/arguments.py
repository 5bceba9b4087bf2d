"""Parsing of command lines: the parser that all scripts use, and types of values."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

# More than anybody needs, and small enough that counters alone do not fill the memory.
MOST_STEPS = 10**9
MOST_IMAGES = 2**16
MOST_PROCESSES = 1024
_LONGEST_SIDE = 2**15


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those of flags that are off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_switch = action.default in (None, False) or isinstance(action, argparse._StoreFalseAction)
        return action.help if is_switch else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, with one-line errors that mention --help, and without abbreviated flags."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists all flags)\n")


def size(text: str) -> tuple[int, int]:
    """Parse "height,width" in pixels."""
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected height,width in pixels (e.g. 769,769), got {text!r}") from None
    if min(height, width) < 8:
        raise argparse.ArgumentTypeError(f"expected at least 8,8, since the network works at 1/8, got {text!r}")
    if max(height, width) > _LONGEST_SIDE:
        raise argparse.ArgumentTypeError(f"expected at most {_LONGEST_SIDE},{_LONGEST_SIDE}, got {text!r}")
    return height, width


def pixel(text: str) -> tuple[int, int]:
    """Parse "y,x" in pixels."""
    try:
        y, x = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected Y,X in pixels, got {text!r}") from None
    return y, x


def loaded_by(load: Callable[[str], Any], error: type[Exception]) -> Callable[[str], Any]:
    """A parser of what `load` makes of the text; errors of that type become errors of the command line."""

    def parse(text: str):
        try:
            return load(text)
        except error as reason:
            raise argparse.ArgumentTypeError(str(reason)) from None

    return parse


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A parser of an int or float within [low, high]."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, got {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text!r}")
        return value

    return parse


def numbers(names: str, *greatest: float) -> Callable[[str], tuple[float, ...]]:
    """A parser of numbers with commas between them, as their `names` have it, each within [0, its greatest]."""

    def parse(text: str):
        try:
            values = tuple(float(part) for part in text.split(","))
        except ValueError:
            values = ()
        if len(values) != len(greatest):
            raise argparse.ArgumentTypeError(f"expected the numbers {names}, got {text!r}")
        for name, value, most in zip(names.split(","), values, greatest, strict=True):
            if not 0 <= value <= most:
                raise argparse.ArgumentTypeError(f"expected {name} from 0 to {most:g}, got {value:g} in {text!r}")
        return values

    return parse


def boolean(text: str) -> bool:
    """Parse 1/0, true/false, yes/no."""
    try:
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected 1 or 0 (true/false, yes/no), got {text!r}") from None
