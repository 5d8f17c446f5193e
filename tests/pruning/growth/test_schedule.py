"""When masks change, by how much, and which arguments cannot be used."""

import math

import pytest

from lightning_graphon.pruning import GrowthConfig, GrowthSchedule
from lightning_graphon.pruning.growth.schedule import count_of


def test_updates_come_before_the_last_step_alone():
    schedule = GrowthSchedule(every_n_steps=10, fraction=0.3, last=40)
    assert [step for step in range(100) if schedule.is_due(step)] == [10, 20, 30]
    assert schedule.updates == 3
    assert GrowthSchedule(10, 0.3, last=41).updates == 4
    assert GrowthSchedule(10, 0.3, last=5).updates == 0
    assert [schedule.progress_at(step) for step in (10, 20, 30, 90)] == [1 / 3, 2 / 3, 1, 1]


def test_the_share_falls_by_a_cosine():
    schedule = GrowthSchedule(every_n_steps=1, fraction=0.4, last=100)
    for step in (1, 33, 50, 99):
        assert schedule.fraction_at(step) == pytest.approx(0.2 * (1 + math.cos(math.pi * step / 100)), abs=1e-12)
    assert schedule.fraction_at(0) == 0.4
    assert schedule.fraction_at(100) == 0.0


@pytest.mark.parametrize(("share", "total", "count"), [(0.29, 100, 29), (0.3, 10, 3), (0.1 * 3, 10, 3), (0.99, 3, 2)])
def test_whole_numbers_do_not_depend_on_the_last_digit(share, total, count):
    assert count_of(share, total) == count


def test_stop_is_a_share_or_a_step():
    assert GrowthConfig("rigl", stop=0.75).schedule(1000).last == 750
    assert GrowthConfig("rigl", stop=1).schedule(1000).last == 1
    assert GrowthConfig("rigl", stop=1.0).schedule(1000).last == 1000
    assert GrowthConfig("rigl", stop=300).schedule(math.inf).last == 300
    with pytest.raises(ValueError, match="number is unknown"):
        GrowthConfig("rigl").schedule(math.inf)


@pytest.mark.parametrize(
    ("method", "options", "window"),
    [("rigl", {}, 1), ("set", {}, 0), ("snfs", {}, 30), ("snfs", {"momentum": 0.99}, 100), ("srigl", {}, 1)],
)
def test_gradients_are_needed_no_longer_than_they_matter(method, options, window):
    assert GrowthConfig(method, options=options).window == window
    assert GrowthConfig(method, redistribute=method == "set").needs in ("gradient", "momentum")
