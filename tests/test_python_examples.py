"""The Python in docs/api/ runs, on tiny networks."""

import re

import numpy as np
from commands_util import prepare_commands
from documents_util import documents
from paths import ROOT
from sampling_util import NETWORK

PAGE = ROOT / "docs" / "api" / "index.md"


def test_examples_run(tmp_path, monkeypatch):
    prepare_commands(tmp_path)
    (tmp_path / "diffusion" / "ema_0.9_000010.pt").rename(tmp_path / "ema_0.9999_410000.pt")
    (tmp_path / "diffusion" / "config.json").rename(tmp_path / "config.json")
    (tmp_path / "TRAIN" / "IMG" / "r0.png").rename(tmp_path / "radiograph.png")
    monkeypatch.chdir(tmp_path)
    segment, sample = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {}
    exec(segment, names)
    assert names["mask"].dtype == np.uint8
    assert names["mask"].shape == (16, 16)
    assert names["prediction"].probabilities.shape == (3, 16, 16)
    assert 0 <= names["prediction"].uncertainty.min() <= names["prediction"].uncertainty.max() <= 1
    names = {}
    exec(sample, names)
    assert names["images"].shape == (2, NETWORK.in_channels, 16, 16)


def test_python_in_documents_compiles():
    for page in documents():
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            compile(block, str(page), "exec")
