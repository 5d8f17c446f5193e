"""Files that are written whole or not at all."""

import os
import secrets
import shutil
from os import PathLike
from pathlib import Path


def write_file(path: str | PathLike[str], content: bytes) -> None:
    """Write a file beside `path` and rename it: whatever happens, `path` is the old file or the new one.

    Args:
        path: In a folder that is there. Links are followed; an older file keeps its permissions.
        content: The whole file.

    Raises:
        OSError: The file cannot be written; the one that was there is as it was.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # such as /dev/stdout
        target.write_bytes(content)
        return
    beside = target.with_name(f".{secrets.token_hex(8)}.tmp")  # short, whatever the length of the name
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a rename may reach the disk before the content
        if target.exists():
            shutil.copymode(target, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
