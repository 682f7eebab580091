"""What the scripts of lab/ share: how they start, their flags, and how a mistake is told."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat


def add_device(parser):
    """The flag --device, as dat.py has it."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="default: auto, a GPU if there is one")


def run(main, docstring):
    """main(parser). A caller's mistake becomes one line on standard error and exit code 2."""
    name = Path(sys.argv[0]).name
    try:
        main(argparse.ArgumentParser(description=docstring, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawTextHelpFormatter))
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except (dat.InputError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split()):.400}", file=sys.stderr)
        sys.exit(2)
