"""The demo in a small setting."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_demo_writes_table_pictures_and_logs(tmp_path, capsys):
    script = runpy.run_path(str(SCRIPT))
    (tmp_path / "dense").mkdir()
    old = tmp_path / "dense" / "events.out.tfevents.1.an.earlier.demo"
    old.touch()
    results = script["main"](["--width", "32", "--epochs", "3", "--out", str(tmp_path), "--accelerator", "cpu"])
    assert list(results) == ["dense", "random", "magnitude", "snip", "grasp", "synflow"]
    for method, result in results.items():
        logged, curves = script["read_curves"](tmp_path / method), result.decay.curves
        observed = dict(zip(curves["step"].tolist(), curves["observed"].tolist(), strict=True))
        assert logged["observed"] == pytest.approx(observed), "the chart is drawn from the logs"
        assert {0, 10} <= set(logged["predicted"])
        assert list(tmp_path.glob(f"{method}/events.out.tfevents.*"))
        if method != "dense":
            assert result.masks.sparsity == pytest.approx(0.9, abs=1e-3)
            assert len(result.monitor.graphons) == 5
    assert not old.exists()
    assert (tmp_path / "masks.png").stat().st_size > 10_000
    assert (tmp_path / "graphons.png").stat().st_size > 10_000
    assert (tmp_path / "loss_decay.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "tensorboard --logdir" in printed
    assert "synflow" in printed
