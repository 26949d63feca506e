"""Options: types of arguments, and a parser whose errors are one line."""

import argparse
import re
import sys

import torch

from checkpoint.adapters import LONGEST_STYLE
from styledrop import WEIGHTS, StyleDrop

LONGEST = LONGEST_STYLE                 # characters of a prompt or a name


class Parser(argparse.ArgumentParser):
    """A wrong option is an error of one line, like every other mistake (see run_command).

    Options cannot be abbreviated: a new option could make an abbreviation ambiguous.
    """

    def __init__(self, **settings):
        settings["allow_abbrev"] = False
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            message += "; put a prompt or a phrase of several words in quotes"
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse "-x" after an option.

        argparse would report a missing value or an unknown option, and not how to give it as a
        value ("--prompt=-x").
        """
        arguments = sys.argv[1:] if args is None else args
        option = None
        for argument in arguments:
            if argument.startswith("--"):
                option = argument.partition("=")[0]
                if argument.endswith("=--"):                 # argparse would read an empty list
                    self.error(f"{argument} has no value")
            elif option is not None and looks_like_option(argument):
                self.error(f"{argument} is not an option; if it is a value, write "
                           f"{option}={argument}")
        return super().parse_known_args(arguments, namespace)


def looks_like_option(argument):
    """Would argparse take an argument that begins with one dash for an option?

    It does not if the argument is a number or contains a space.
    """
    if not argument.startswith("-") or argument.startswith("--") or argument in ("-", "-h"):
        return False
    is_number = re.fullmatch(r"-(\d+|\d*\.\d+)", argument)
    return not is_number and " " not in argument


def number(kind, low, high, above=False):
    """An argparse type: an int or float from `low` (above=True: more than that) to `high`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not {what}") from None
        too_low = value <= low if above else value < low
        if too_low or not value <= high:                     # "not <=" also catches NaN
            least = f"above {low}" if above else f"at least {low}"
            most = f"{high:,}" if kind is int else f"{high:,.15g}"
            raise argparse.ArgumentTypeError(f"{text[:80]} must be {least} and at most {most}")
        return value
    return parse


def whole(low, high):
    """An argparse type: a whole number from low to high."""
    return number(int, low, high)


def text(argument):
    """An argparse type: text that is valid UTF-8 and not too long."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{ascii(argument[:80])} is not valid UTF-8") from None
    if len(argument) > LONGEST:
        raise argparse.ArgumentTypeError(f"{argument[:40]!r}... has {len(argument):,} characters; "
                                         f"give at most {LONGEST:,}")
    return argument


def filled(argument):
    """An argparse type: text that is not empty."""
    if not argument.strip():
        raise argparse.ArgumentTypeError("is empty; leave the option out, or give it a value")
    return text(argument)


def add_base_options(parser, superres=True):
    """--weights and --device; also --no-superres, unless superres=False.

    superres=False is for commands that decide themselves which stages they use.
    """
    parser.add_argument("--weights", type=filled, default=WEIGHTS,
                        help="folder of the base's weights (default: the shipped ones)")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to compute (default: cuda where there is a GPU)")
    parser.set_defaults(superres=True)
    if superres:
        parser.add_argument("--no-superres", dest="superres", action="store_false",
                            help="use only the first stage: faster, and images of 64 x 64 pixels")


def load_pipeline(args):
    """The pipeline of --weights on --device.

    Raises ValueError if --no-superres is given and there is no second stage.
    """
    pipe = StyleDrop.load(args.weights, args.device)
    if not args.superres and pipe.superres is None:
        raise ValueError(f"{args.weights} has no second stage; leave --no-superres out")
    return pipe
