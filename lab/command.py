"""What the scripts of lab/ share: how they start, and how a caller's mistake is told."""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat


def run(main, docstring):
    """main(parser). A caller's mistake becomes one line on standard error and exit code 2."""
    try:
        main(argparse.ArgumentParser(description=docstring, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawTextHelpFormatter))
    except (dat.InputError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split()):.300}", file=sys.stderr)
        sys.exit(2)
