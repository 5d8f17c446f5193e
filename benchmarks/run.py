"""Run every benchmark of this folder in turn, each in a process of its own; results are printed as markdown."""

import subprocess
import sys
from pathlib import Path


def main() -> None:
    here = Path(__file__).parent
    for script in sorted(here.glob("[!_]*.py")):
        if script.name != "run.py":
            subprocess.run([sys.executable, str(script)], check=True)


if __name__ == "__main__":
    main()
