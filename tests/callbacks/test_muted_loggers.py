"""Loggers while the library runs a `training_step`: everything can be asked, nothing is written."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_graphon.callbacks._module.muted_loggers import muted_loggers
from tests.helpers.modules import Classifier, loader, make_trainer, quiet


class Own(Logger):
    """A user's logger, with a client that knows its run."""

    name, version, save_dir = "own", 3, "here"

    class Client:
        run, notes, written = "r1", None, []

        def get_url(self):
            return "https://example.org/r1"

        def send(self, value):
            self.written.append(value)

    def __init__(self):
        super().__init__()
        self.experiment = self.Client()

    def log_metrics(self, metrics, step=None):
        self.experiment.send(metrics)

    def log_picture(self, picture):
        self.experiment.send(picture)

    def log_hyperparams(self, params, *args, **kwargs): ...


LOGGERS = {"csv": CSVLogger, "tensorboard": TensorBoardLogger, "own": lambda folder: Own()}


@pytest.mark.parametrize("kind", LOGGERS)
def test_what_a_logger_is_and_where_it_writes(kind, tmp_path):
    trainer = make_trainer(logger=LOGGERS[kind](tmp_path))
    names = ("name", "version", "save_dir", "log_dir", "root_dir")
    logger, expected = trainer.logger, [getattr(trainer.logger, name, None) for name in names]
    folder = trainer.log_dir
    with muted_loggers(trainer):
        assert isinstance(trainer.logger, type(logger))
        assert [getattr(trainer.logger, name, None) for name in names] == expected
        assert trainer.log_dir == folder
        trainer.logger.log_metrics({"a": 1.0}, 0)
        trainer.logger.save()
    assert trainer.logger is logger


def test_clients_are_read_and_not_called():
    trainer = make_trainer(logger=Own())
    with muted_loggers(trainer):
        client = trainer.logger.experiment
        assert (client.run, client.notes, client.get_url()) == ("r1", None, "https://example.org/r1")
        trainer.logger.log_picture(1)
        client.send(2)
        client.deep.table["x"].append(list(client.rows))
        with client.start() as run:
            run["y"] = 3
    assert Own.Client.written == []


@pytest.mark.parametrize("by", ["logger", "trainer"])
def test_a_step_that_writes_into_the_log_directory(by, tmp_path):
    class Draws(Classifier):
        def training_step(self, batch, batch_idx):
            folder = Path(getattr(self, by).log_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "sample.txt").write_text("")
            return super().training_step(batch, batch_idx)

    make_trainer(quiet("snip"), logger=CSVLogger(tmp_path)).fit(Draws(), loader())
    assert list(tmp_path.rglob("sample.txt"))
