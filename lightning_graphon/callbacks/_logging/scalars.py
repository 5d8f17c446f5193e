"""What a user reads: the table of sparsities on the console, the same numbers in every logger."""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_graphon.graphon import limit_distances
from lightning_graphon.pruning import Masks

_WORDS = ("layer", "shape", "verdict")  # columns that begin at the left


def sparsity_scalars(masks: Masks) -> dict[str, float]:
    """`sparsity/<layer>`, by the qualified name of the layer's parameter, and `sparsity/total`."""
    scalars = {f"sparsity/{row['layer']}": row["sparsity"] for row in masks.table()}
    return {**scalars, "sparsity/total": masks.sparsity}


def log_scalars(trainer: pl.Trainer, scalars: dict[str, float]) -> None:
    """Send scalars to every logger at the current optimizer step, and to callbacks that monitor one."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=trainer.global_step)
    if trainer.world_size == 1:  # monitors run on the first process only; the others could not take the same decision
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


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
    """Print for the user; names of layers such as "[/INST]" are text and no markup."""
    Console(markup=False, emoji=False).print(what)


def print_masks(masks: Masks, title: str, limits: Mapping[str, float] | None = None) -> None:
    """One table: layer, shape, kept weights, sparsity, units without a connection, distance from the limit."""
    last = ["limit"] if limits else []
    table = layer_table(title, ["layer", "shape", "kept", "of", "sparsity", "dead\nout", "dead\nin", *last])
    for row in masks.table():
        shape = "x".join(map(str, row["shape"]))
        cells = [row["kept"], row["total"], f"{row['sparsity']:.4f}", row["dead_out"], row["dead_in"]]
        if limits:
            cells.append(f"{limits['graphon/' + row['layer'] + '/limit_distance']:.4f}")
        table.add_row(row["layer"], shape, *map(str, cells))
    table.add_section()
    table.add_row("total", "", str(masks.kept), str(masks.total), f"{masks.sparsity:.4f}", "", "")
    show(table)
    show("Masks simulate sparsity: pruned weights stay zero, training is neither faster nor smaller by itself.")
