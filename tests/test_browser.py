"""What is written for a browser, seen in one: Chromium without a window, where it is on PATH."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from html import unescape

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_graphon.callbacks import GraphonMonitor, LossDecayMonitor
from lightning_graphon.report.report import write_report
from tests.helpers.modules import Classifier, loader, make_trainer, quiet

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
MEASURE = """<script>window.onload = () => { document.title = JSON.stringify({
  width: document.documentElement.clientWidth, needed: document.documentElement.scrollWidth,
  broken: [...document.images].filter(image => !image.naturalWidth).length, images: document.images.length,
  hidden: [...document.querySelectorAll('.card')].filter(card => card.scrollWidth > card.clientWidth + 1).length,
}) }</script>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")]


def chromium(profile, url, *options):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *options, url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method in ("snip", "random"):
        pl.seed_everything(0, verbose=False)
        callbacks = [quiet(method), GraphonMonitor(verbose=False), LossDecayMonitor(every_n_steps=2, verbose=False)]
        logger = TensorBoardLogger(folder, name=method, version="")
        trainer = make_trainer(*callbacks, logger=logger, limit_train_batches=1.0, max_epochs=6, log_every_n_steps=1)
        trainer.fit(Classifier(), loader())
    return folder


@pytest.mark.parametrize("width", [500, 1300])  # Chromium's own least width is 500
def test_report_fits_the_window_and_shows_its_pictures(runs, tmp_path, width):
    html = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    copy = tmp_path / "measured.html"
    copy.write_text(html.replace("</head>", f"{MEASURE}</head>"), encoding="utf-8")
    dom = chromium(tmp_path / "profile", copy.as_uri(), f"--window-size={width},2000", "--dump-dom")
    seen = json.loads(unescape(re.search(r"<title>(.*?)</title>", dom).group(1)))
    assert width - 30 <= seen["width"] <= width  # less a scroll bar
    assert seen["needed"] <= seen["width"]
    assert seen["images"] == 8
    assert seen["broken"] == seen["hidden"] == 0


def test_tensorboard_opens_on_both_losses_in_one_picture(runs, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs / "snip"), "--port", str(port)]
    server = subprocess.Popen([*command, "--load_fast=false"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://localhost:{port}/data/plugin/timeseries/tags")
        picture = tmp_path / "tensorboard.png"
        options = ["--window-size=1300,700", "--virtual-time-budget=20000", f"--screenshot={picture}"]
        chromium(tmp_path / "profile", f"http://localhost:{port}/", *options)
    finally:
        server.terminate()
        server.wait(timeout=20)
    from matplotlib.image import imread

    pixels = np.round(imread(picture)[..., :3] * 255).astype(int)
    # The first card lies right of the list of runs and below the heads of "Pinned" and of its group.
    card = pixels[240:560, 280:700]
    for colour in ((27, 27, 27), (194, 65, 12)):  # of the figure, which no other card has
        curve = np.abs(card - colour).max(axis=-1) < 40
        assert curve.any(axis=0).sum() > 80  # it crosses the picture


def wait_for(url, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if b"Loss_decay" in answer(url):
            return
        time.sleep(0.5)
    pytest.fail(f"TensorBoard does not answer at {url}")


def answer(url):
    try:
        with urllib.request.urlopen(url) as reply:  # noqa: S310  (our own server)
            return reply.read()
    except urllib.error.URLError:
        return b""
