"""Files that appear in a folder together: all of them, or none."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial

from guided_diffusion.runtime.files import remove_file, writing

_STAGE = ".partial"


class Changes:
    """New and replaced files, written beside the folder's own until all are complete."""

    def __init__(self, folder: str):
        self.folder = folder
        self.stage = os.path.join(folder, _STAGE)
        self._targets: list[str] = []

    def write(self, target: str, write: Callable[[str], object]) -> None:
        """Let `write` write a file, at a path of the same ending, that will appear at `target`."""
        write(self._staged(len(self._targets), target))
        self._targets.append(target)

    def _staged(self, number: int, target: str) -> str:
        return os.path.join(self.stage, f"{number}", os.path.basename(target))

    def _commit(self) -> None:
        """Move all files to their places; put everything back if one cannot be moved."""
        undo: list[Callable[[], object]] = []
        try:
            for number, target in enumerate(self._targets):
                staged = self._staged(number, target)
                for folder in _missing_folders(os.path.dirname(target)):
                    os.mkdir(folder)
                    undo.append(partial(os.rmdir, folder))
                if os.path.lexists(target):
                    kept = f"{staged}.old"
                    shutil.copyfile(target, kept, follow_symlinks=False)
                    undo.append(partial(os.replace, kept, target))
                else:
                    undo.append(partial(remove_file, target))
                os.replace(staged, target)
        except BaseException:
            for step in reversed(undo):
                step()
            raise


@contextlib.contextmanager
def together(folder: str) -> Iterator[Changes]:
    """Changes of an existing folder, which take place at the end unless something is raised."""
    changes = Changes(folder)
    shutil.rmtree(changes.stage, ignore_errors=True)  # of a command that was killed
    try:
        with writing(folder):
            yield changes
            changes._commit()
    finally:
        shutil.rmtree(changes.stage, ignore_errors=True)


def _missing_folders(folder: str) -> list[str]:
    """The folders to make, from the outermost."""
    missing: list[str] = []
    while folder and not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing[::-1]
