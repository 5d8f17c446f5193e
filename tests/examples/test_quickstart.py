"""The demo in a small setting."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_demo_writes_table_pictures_and_logs(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    results = main(["--width", "32", "--epochs", "3", "--out", str(tmp_path), "--accelerator", "cpu"])
    assert list(results) == ["dense", "random", "magnitude", "snip", "grasp", "synflow"]
    for method, result in results.items():
        assert result.loss < 2.4, "the loss at step 50 was taken"
        assert list(tmp_path.glob(f"{method}/events.out.tfevents.*"))
        if method != "dense":
            assert result.masks.sparsity == pytest.approx(0.9, abs=1e-3)
            assert len(result.monitor.graphons) == 5
    assert (tmp_path / "masks.png").stat().st_size > 10_000
    assert (tmp_path / "graphons.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "tensorboard --logdir" in printed
    assert "synflow" in printed
