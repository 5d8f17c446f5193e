"""Run every benchmark of this folder but `gpu.py`, each in a process of its own; results are printed as markdown."""

import subprocess
import sys
from pathlib import Path


def main() -> None:
    here = Path(__file__).parent
    for script in sorted(here.glob("[!_]*.py")):
        if script.stem not in ("run", "gpu"):
            subprocess.run([sys.executable, str(script)], check=True)


if __name__ == "__main__":
    main()
