"""TensorBoard's page as a user sees it, in headless Chromium; skipped where there is no browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from runs import PREFIX, QUIET
from torch.utils.data import DataLoader, Dataset

from lightning_gradconf import GradientConfusionCallback

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None or DRIVER is None, reason="needs chromium and chromedriver"),
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
]
# All text of a page, also within the shadow trees that TensorBoard is made of.
TEXT = """
const found = [], visit = node => {
  if (node.nodeType === Node.TEXT_NODE) found.push(node.textContent.trim());
  if (node.shadowRoot) visit(node.shadowRoot);
  if (!['SCRIPT', 'STYLE', 'DOM-MODULE'].includes(node.nodeName)) node.childNodes.forEach(visit);
};
visit(document.body);
return found.filter(Boolean).join('\\n');
"""


class Images(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(1, 8, 8, generator=generator), index % 3


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory) -> Iterator[str]:
    """The address of a TensorBoard that shows one short run."""
    folder = tmp_path_factory.mktemp("runs")
    confusion = GradientConfusionCallback(every_n_train_steps=2, figures=True, top_pairs=3, labels=1, per_layer=True)
    options = {"max_steps": 8, "log_every_n_steps": 1, "enable_checkpointing": False}
    trainer = pl.Trainer(logger=TensorBoardLogger(folder), callbacks=[confusion], **(QUIET | options))
    trainer.fit(Classifier(), DataLoader(Images(), batch_size=8))
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", "--port=0", "--load_fast=false"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                if address := re.search(r"at (http://\S+)", line):
                    yield address[1]
                    break
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(tensorboard: str, tmp_path_factory) -> Iterator[Callable[[str], Callable[[], str]]]:
    """Opens a page of TensorBoard and returns a function that reads it."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1600,1200", f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def open_page(name: str) -> Callable[[], str]:
        driver.get("about:blank")
        driver.get(f"{tensorboard}#{name}")
        return lambda: str(driver.execute_script(TEXT))

    yield open_page
    driver.quit()


PAGES = {
    "custom_scalars": ["min_cosine, loss, accuracy: see Matches", "cosines, 5 % to 95 %"],
    "scalars": ["train_loss", "min_cosine", "negative_fraction", "within_class_cosine"],
    "images": ["heatmap", "density", "classes", "layers", "top_pairs"],
    "histograms": ["cosines"],
    "text": ["top_pairs", "sample"],
}


@pytest.mark.parametrize("name", PAGES)
def test_charts_are_found_by_their_titles(name: str, page: Callable[[str], Callable[[], str]]) -> None:
    read = page(name)
    missing = [PREFIX, *PAGES[name]]
    end = time.monotonic() + 60
    while missing and time.monotonic() < end:
        time.sleep(0.5)
        text = read()
        missing = [title for title in missing if title not in text]
    assert not missing, text[-2000:]
