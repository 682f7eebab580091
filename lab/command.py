"""What the scripts of lab/ share: a parser, and how a caller's mistake is told."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat


def count(text: str) -> int:
    """For argparse: a whole number, 1 or more."""
    if not text.isdecimal() or not 1 <= int(text) < 2 ** 31:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, not {text!r}")
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise dat.InputError(f"{message} ({self.prog} --help lists the flags)")


def run(main, docstring: str) -> None:
    """main(parser). A caller's mistake becomes one line on standard error and exit code 2."""
    try:
        main(Parser(description=docstring, formatter_class=argparse.RawTextHelpFormatter))
    except dat.InputError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split()):.300}", file=sys.stderr)
        sys.exit(2)
