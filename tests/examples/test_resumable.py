"""The tables of the examples: stopped, continued, and never half written."""

import numpy as np
import pytest
from rich.console import Console


@pytest.fixture
def finish(example, tmp_path):
    """Runs a table of the numbers 0 to 4; a cell is done by `work`."""

    def run(work, kind="json"):
        return example.finish(
            tmp_path / "cells", range(5), stem=str, work=work, describe=str, console=Console(quiet=True), kind=kind
        )

    return run


@pytest.mark.parametrize("kind", ["json", "npz"])
def test_what_is_computed_is_what_is_read(finish, kind):
    results = finish(lambda cell: {"square": np.array(cell**2) if kind == "npz" else cell**2}, kind)
    assert {cell: int(found["square"]) for cell, found in results.items()} == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16}


def test_an_interrupted_table_goes_on_where_it_was(finish, tmp_path):
    computed = []

    def stop_at_three(cell):
        if cell == 3:
            raise KeyboardInterrupt
        computed.append(cell)
        return {"from": "first"}

    with pytest.raises(SystemExit):
        finish(stop_at_three)
    assert computed == [0, 1, 2]
    results = finish(lambda cell: computed.append(cell) or {"from": "second"})
    assert computed == [0, 1, 2, 3, 4]
    assert [found["from"] for found in results.values()] == ["first"] * 3 + ["second"] * 2


def test_a_result_that_cannot_be_written_leaves_no_file(finish, tmp_path):
    with pytest.raises(TypeError):
        finish(lambda cell: {"value": object()})
    assert not list(tmp_path.glob("cells/*.json"))
