"""What is shown of graphons: pictures of some layers, and the table of all on the console."""

from collections.abc import Mapping
from typing import TypeVar

import lightning.pytorch as pl
import numpy as np

from lightning_graphon.callbacks._logging.images import SCALE, send_figure, send_picture, takes_pictures
from lightning_graphon.callbacks._logging.scalars import layer_table, show
from lightning_graphon.graphon import HomogeneityTest, LayerFlow, StepGraphon
from lightning_graphon.plots import graphon_image, p_value_text, plot_graphon_flow

_MOST_LAYERS = 6  # in pictures for cards, two rows of the overview
ValueT = TypeVar("ValueT")


def spread(layers: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """A few of many layers, the first and the last among them."""
    names, few = list(layers), min(len(layers), _MOST_LAYERS)
    return {names[i]: layers[names[i]] for i in (k * (len(names) - 1) // max(few - 1, 1) for k in range(few))}


def send_graphons(
    trainer: pl.Trainer, graphons: Mapping[str, StepGraphon], tests: Mapping[str, HomogeneityTest], *, each: bool
) -> None:
    """An overview, of a few layers where it goes into a card; these one by one, too, where that is wanted."""
    cards, step = takes_pictures(trainer), f"step {trainer.global_step}"
    shown = spread(graphons) if cards else graphons
    left_out = f"\n{len(shown)} of {len(graphons)} layers; numbers of all: graphon/…"
    pictures = {"graphons": (shown, f"Layer graphons at {step}" + left_out * (len(shown) < len(graphons)))}
    if cards and each and len(shown) > 1:
        pictures.update({f"graphons/{name}": ({name: graphon}, step) for name, graphon in shown.items()})
    for tag, (own, title) in pictures.items():
        arrays = {name: graphon.values.cpu().numpy() for name, graphon in own.items()}
        send_picture(trainer, tag, graphon_image(own, tests, title, scale=SCALE), arrays)


def send_flow(trainer: pl.Trainer, flows: Mapping[str, LayerFlow]) -> None:
    """Where graphons went, of a few layers."""
    shown = spread({name: flow.points for name, flow in flows.items()})
    arrays = {f"{name}/cells": np.stack([p.cells for p in points]) for name, points in shown.items()}
    send_figure(trainer, "graphon_flow", plot_graphon_flow(shown), arrays)


def print_graphons(
    graphons: Mapping[str, StepGraphon], tests: Mapping[str, HomogeneityTest], scalars: Mapping[str, float]
) -> None:
    """A row for each layer.

    Args:
        graphons: Layer -> its graphon.
        tests: Layer -> its homogeneity test, where there is one.
        scalars: The numbers that are logged.
    """
    table = layer_table("Layer graphons", ["layer", "density", "degree\nCV", "C4\nratio", "p-value", "verdict"])
    for name in graphons:
        numbers = [scalars.get(f"graphon/{name}/{key}") for key in ("density", "degree_cv", "c4_ratio")]
        tested = ("", "too large to test")
        if name in tests:
            tested = p_value_text(tests[name].p_value).removeprefix("= "), tests[name].verdict
        table.add_row(name, *("" if number is None else f"{number:.3g}" for number in numbers), *tested)
    show(table)
