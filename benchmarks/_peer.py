"""Another package in an environment and a process of its own, which answers a line for every line it is sent."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def peer(requirements: Sequence[str], code: str) -> Iterator[Callable[[str], str]]:
    """Install `requirements` in a temporary environment and run `code` there until the block ends.

    Yields a function that sends one line and waits for the answer; "stop" is sent at the end.

    Raises:
        subprocess.CalledProcessError: the packages cannot be installed.
        RuntimeError: `code` ended instead of answering; its own message is on the standard error.
    """
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        # Without the search path of this process, or the peer would import the packages of this one.
        pipe = subprocess.Popen([python, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def ask(line: str = "go") -> str:
            print(line, file=pipe.stdin, flush=True)
            answer = pipe.stdout.readline()
            if not answer:
                raise RuntimeError(f"the process of {requirements[0]} ended without an answer to {line!r}")
            return answer

        try:
            yield ask
        finally:
            if pipe.poll() is None:
                print("stop", file=pipe.stdin, flush=True)
            pipe.wait()
