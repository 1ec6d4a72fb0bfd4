"""A logger as at the start of a process, and the rows of a table that it has written."""

import csv

import pytest

from guided_diffusion import logger


@pytest.fixture
def fresh_logger(monkeypatch):
    """No environment variables, no logger of an earlier test."""
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    yield
    logger.reset()


def read_rows(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
