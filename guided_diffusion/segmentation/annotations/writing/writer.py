"""What writers of all formats have in common."""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from guided_diffusion.segmentation.annotations.writing.labelled import Labelled, Source
from guided_diffusion.segmentation.categories import Category


class Writer:
    """Writes the masks of several radiographs in one format.

    :param folder: where; it need not exist.
    :param sources: the radiographs, in the order in which tables list them.
    :param labels: see `labelled.labels_of`.
    :param drawn: whether people drew the masks, rather than a network.
    """

    TRACES = False  # whether it needs `Labelled.shapes`
    PACKAGES: tuple[str, ...] = ()  # without which it cannot work

    def __init__(
        self, folder: str, sources: Sequence[Source], labels: Sequence[Category], drawn: bool
    ):
        self.folder, self.sources, self.labels, self.drawn = folder, sources, labels, drawn

    def check(self, skip_unreadable: bool) -> None:
        """:raises UserError: if the format cannot hold one of the radiographs."""

    def paths(self) -> list[str]:
        """The files that it will write."""
        raise NotImplementedError

    def add(self, labelled: Labelled) -> None:
        """Write a radiograph, or keep what `close` writes of it; threads may do so at once."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what belongs to all that were added."""


class FileWriter(Writer):
    """Writes a file for each radiograph."""

    ENDING: str

    def path_of(self, source: Source) -> str:
        return os.path.join(self.folder, source.name + self.ENDING)

    def paths(self) -> list[str]:
        return [self.path_of(source) for source in self.sources]


class TableWriter(Writer, ABC):
    """Writes one file for all radiographs."""

    TRACES = True
    PACKAGES = ("shapely",)
    FILE: str

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._records: dict[str, Any] = {}
        self._lock = threading.Lock()

    @property
    def path(self) -> str:
        return os.path.join(self.folder, self.FILE)

    def paths(self) -> list[str]:
        return [self.path]

    def add(self, labelled: Labelled) -> None:
        record = self.record(labelled)
        with self._lock:
            self._records[labelled.source.name] = record

    def close(self) -> None:
        names = (source.name for source in self.sources)
        self.write([self._records[name] for name in names if name in self._records])

    @abstractmethod
    def record(self, labelled: Labelled) -> Any:
        """What the table holds of a radiograph."""

    @abstractmethod
    def write(self, records: list[Any]) -> None:
        """Write the table of these records."""
