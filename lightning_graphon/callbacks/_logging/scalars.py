"""What a user reads: the table of sparsities on the console, the same numbers in every logger."""

from collections.abc import Collection, Mapping, Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich import box
from rich.table import Table
from torch import Tensor, nn

from lightning_graphon.callbacks._logging.progress import current_console
from lightning_graphon.graphon import limit_distances
from lightning_graphon.pruning import Masks

_WORDS = ("layer", "shape", "verdict")  # columns that begin at the left


def log_scalars(trainer: pl.Trainer, scalars: dict[str, float], not_in_tensorboard: Collection[str] = ()) -> None:
    """Send scalars to every logger at the current optimizer step, and to callbacks that monitor one."""
    shown = {name: value for name, value in scalars.items() if name not in not_in_tensorboard}
    for logger in trainer.loggers:
        logger.log_metrics(shown if isinstance(logger, TensorBoardLogger) else scalars, step=trainer.global_step)
    if trainer.world_size == 1:  # monitors run on the first process only; the others could not take the same decision
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def log_layer_table(trainer: pl.Trainer, tag: str, scalars: Mapping[str, float]) -> None:
    """Scalars of layers as one table under TensorBoard's Text, in place of a chart of one dot for each."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in scalars.items():
        kind, _, rest = key.partition("/")
        layer, _, column = (rest, "", kind) if kind == "sparsity" else rest.rpartition("/")
        rows.setdefault(layer, {})[column] = value
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown_table(rows), trainer.global_step)


def markdown_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Layer -> column -> number in Markdown, whatever characters the names of users have; the report reads it back."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["layer", *columns]]
    lines += [[name, *(f"{row[c]:.4g}" if c in row else "" for c in columns)] for name, row in rows.items()]
    head, *body = (f"| {' | '.join(map(_escaped, line))} |" for line in lines)
    return "\n".join([head, f"|{'---|' * (len(columns) + 1)}", *body])


def _escaped(text: str) -> str:
    """Everything that could mean something in Markdown or HTML, as a character reference."""
    return "".join(c if c.isalnum() or c in " .-/" else f"&#{ord(c)};" for c in text)


def limit_scalars(scores: Mapping[str, Tensor], masks: Masks) -> dict[str, float]:
    """`graphon/<layer>/limit_distance`, of layers that were scored."""
    scored = {name: mask for name, mask in masks.items() if name in scores}
    return {f"graphon/{name}/limit_distance": d for name, d in limit_distances(scores, scored).items()}


def layer_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table that leaves most of 80 columns to names such as `net.layer4.0.downsample.0.weight`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right", overflow="fold")
    return table


def show(what: Table | str) -> None:
    """Print for the user."""
    current_console().print(what)


def print_masks(
    masks: Masks, title: str, limits: Mapping[str, float] | None = None, model: nn.Module | None = None
) -> None:
    """One table: layer, shape, kept weights, sparsity, units without a connection, distance from the limit."""
    last = ["limit"] if limits else []
    table = layer_table(title, ["layer", "shape", "kept", "of", "sparsity", "dead\nout", "dead\nin", *last])
    for row in masks.table(model):
        shape = "x".join(map(str, row["shape"]))
        cells = [row["kept"], row["total"], f"{row['sparsity']:.4f}", row["dead_out"], row["dead_in"]]
        if limits:
            cells.append(f"{limits['graphon/' + row['layer'] + '/limit_distance']:.4f}")
        table.add_row(row["layer"], shape, *map(str, cells))
    table.add_section()
    table.add_row("total", "", str(masks.kept), str(masks.total), f"{masks.sparsity:.4f}", "", "")
    if model is not None:
        size, removed = sum(p.numel() for p in model.parameters()), masks.total - masks.kept
        table.add_row("model", "", str(size - removed), str(size), f"{removed / size:.4f}", "", "")
    show(table)
    show("Masks simulate sparsity: pruned weights stay zero, training is neither faster nor smaller by itself.")
