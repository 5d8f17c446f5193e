"""Kernels between more samples than fit in memory: tile by tile into a file, by several processes, to be resumed."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_graphon._shared.checks import checked
from lightning_graphon._shared.files import write_file
from lightning_graphon.ntk.operators.tiling import tiles

KernelFn = Callable[[Tensor, Tensor | None], Tensor]
_PROBES = 4  # samples by whose kernel a file is recognised
_SAME = 1e-5  # of the largest entry: what other machines and threads may change in it


@checked
def kernel_to_file(
    kernel_fn: KernelFn,
    x: Tensor,
    path: str | PathLike[str],
    *,
    x2: Tensor | None = None,
    tile: int = 512,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """A kernel between many samples, computed in tiles that are written to a file as they come.

    What is computed stays: called again after an interruption it goes on, and with a file that is complete it reads.
    Beside `path` there is a small `path.json`, which says of which samples and which kernel the file is, and until the
    kernel is complete `path.part` and `path.tiles`; `path` itself is whole once it is there.

    Memory is that of one tile in each process. What must see all samples at once does not fit in tiles: batch norm that
    is calibrated (`sampled_ntk`), and attention, whose heads are drawn for each tile.

    Args:
        kernel_fn: Kernel [n, m] between samples [n, ...] and [m, ...], or [n, n] where the second is None, such as
            `lambda a, b: graphon_ntk_from_model(model, a, masks, x2=b)`. It must give the same numbers each time.
        x: Samples [N, ...].
        path: File to write, a numpy array (`.npy`) [N, N] or [N, M].
        x2: Other samples [M, ...]; without them the kernel is symmetric, and only one of two tiles is computed.
        tile: Samples along each side of a tile.
        workers: Processes that compute tiles, each with one thread; 0 computes in this one. They are those of torch's
            `DataLoader`: where processes are spawned (Windows, macOS) `kernel_fn` must be picklable, thus no lambda.
        progress: Called with the number of tiles that are done and the number of all after each tile.

    Returns:
        The kernel, mapped from the file, whose parts are read as they are used; changes stay in memory.

    Raises:
        ValueError: The file is of other samples, of another kernel, or of another tile; or `kernel_fn` gives
            another shape, or values that are not finite.
        FileExistsError: There is a file at `path` that was not written by this function.
        OSError: It cannot be written.

    >>> import tempfile
    >>> def linear(a, b):
    ...     return a @ (a if b is None else b).T
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kernel_to_file(linear, torch.eye(3), f"{folder}/kernel.npy", tile=2).sum()
    tensor(3.)
    """
    if tile < 1 or workers < 0:
        raise ValueError(f"tile must be at least 1 and workers at least 0, got {tile} and {workers}")
    file = _KernelFile(Path(fspath(path)))
    work = _Tiles(kernel_fn, x, x2, file, list(tiles(len(x), len(x if x2 is None else x2), tile, x2 is None)))
    if not file.prepare(work, tile):
        todo = np.flatnonzero(~np.load(file.done))
        total, before = len(work), len(work) - len(todo)
        for number in DataLoader(work, batch_size=None, sampler=todo.tolist(), num_workers=workers):
            file.tick(int(number))
            before += 1
            if progress is not None:
                progress(before, total)
        file.finish()
    return torch.from_numpy(np.load(file.path, mmap_mode="c"))


class _KernelFile:
    """The files of one kernel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part, self.done, self.about = (path.with_name(f"{path.name}.{end}") for end in ("part", "tiles", "json"))

    def prepare(self, work: "_Tiles", tile: int) -> bool:
        """Begin or go on; whether the kernel is complete already."""
        probe = work.probe()
        about = {"shape": work.shape, "tile": tile, "samples": work.digest(), "dtype": str(probe.dtype)}
        if self.about.exists():
            self._check(json.loads(self.about.read_text()), about, probe)
        elif self.path.exists():
            raise FileExistsError(f"{self.path} is there already, and no kernel that was written here")
        else:
            write_file(self.about, json.dumps({**about, "probe": probe.tolist()}).encode())
        if self.path.exists():
            self.done.unlink(missing_ok=True)
            return True
        if not (self.part.exists() and self.done.exists()):
            open_memmap(self.part, "w+", probe.dtype, work.shape).flush()
            nothing = io.BytesIO()
            np.save(nothing, np.zeros(len(work), bool))
            write_file(self.done, nothing.getvalue())
        return False

    def _check(self, found: dict[str, object], about: dict[str, object], probe: np.ndarray) -> None:
        for name, value in about.items():
            if found.get(name) != (list(value) if isinstance(value, tuple) else value):
                raise ValueError(
                    f"{self.path} is a kernel with other {name} ({found.get(name)}, now {value}); give another path, "
                    f"or remove it together with {self.about.name}"
                )
        before = np.asarray(found["probe"])
        if before.shape != probe.shape or np.abs(before - probe).max() > _SAME * np.abs(probe).max():
            raise ValueError(
                f"{self.path} is another kernel of the same samples: between the first of them it has "
                f"{before.min():.6g} to {before.max():.6g}, now {probe.min():.6g} to {probe.max():.6g}; give another "
                "path"
            )

    def write(self, block: np.ndarray, rows: slice, cols: slice, *, mirrored: bool) -> None:
        """Bring a tile to the disk."""
        # Opened anew for each tile: pages of a mapping that stays open add up to the whole file.
        out = np.load(self.part, mmap_mode="r+")
        out[rows, cols] = block
        if mirrored:
            out[cols, rows] = block.T
        out.flush()

    def tick(self, number: int) -> None:
        """Note that a tile is on the disk."""
        done = np.load(self.done, mmap_mode="r+")
        done[number] = True
        done.flush()

    def finish(self) -> None:
        """Give the whole file its name."""
        self.part.replace(self.path)
        self.done.unlink()


@dataclass
class _Tiles(Dataset[int]):
    """Tiles by number; asked for one, it is computed and written."""

    kernel_fn: KernelFn
    x: Tensor
    x2: Tensor | None
    file: _KernelFile
    slices: Sequence[tuple[slice, slice]]

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, number: int) -> int:
        rows, cols = self.slices[number]
        own = self.x2 is None and rows == cols
        y = self.x if self.x2 is None else self.x2
        block = self._block(self.x[rows], None if own else y[cols])
        self.file.write(block, rows, cols, mirrored=self.x2 is None and not own)
        return number

    def _block(self, left: Tensor, right: Tensor | None) -> np.ndarray:
        block = self.kernel_fn(left, right).detach().cpu()
        shape = (len(left), len(left if right is None else right))
        if block.shape != shape:
            raise ValueError(f"kernel_fn must give {list(shape)} for as many samples, got {list(block.shape)}")
        if not bool(block.isfinite().all()):
            raise ValueError("kernel_fn gives values that are not finite; look for NaN or overflow in the model")
        return block.numpy()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the whole kernel."""
        return len(self.x), len(self.x if self.x2 is None else self.x2)

    def probe(self) -> np.ndarray:
        """Kernel between the first samples, which tells one kernel function from another."""
        return self._block(self.x[:_PROBES], None if self.x2 is None else self.x2[:_PROBES])

    def digest(self) -> str:
        """Digest of the samples."""
        digest = hashlib.sha256()
        for samples in (self.x,) if self.x2 is None else (self.x, self.x2):
            digest.update(f"{samples.dtype} {tuple(samples.shape)}".encode())
            digest.update(samples.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
