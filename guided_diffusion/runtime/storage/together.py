"""Files that appear in a folder together: all of them, or none."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial

from guided_diffusion.runtime.storage.files import remove_file, writing

STAGE = ".partial"  # in the folder, as long as they are not complete


class Changes:
    """New and replaced files, written beside the folder's own until all are complete."""

    def __init__(self, folder: str):
        self.folder = folder
        self.stage = os.path.join(folder, STAGE)
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


@contextlib.contextmanager
def complete(folder: str) -> Iterator[str]:
    """A folder to fill, whose content moves to `folder` at the end unless something is raised.

    :param folder: new or empty but for a `STAGE`, which a command that was killed left.
    """
    stage, moved = os.path.join(folder, STAGE), list[str]()
    made = _missing_folders(folder)
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with writing(folder):
            os.makedirs(stage)
            yield stage
            for name in sorted(os.listdir(stage)):
                os.rename(os.path.join(stage, name), os.path.join(folder, name))
                moved.append(os.path.join(folder, name))
        os.rmdir(stage)
    except BaseException:
        for path in (*moved, stage):
            shutil.rmtree(path, ignore_errors=True)
            if os.path.isfile(path):
                os.remove(path)
        for path in filter(os.path.isdir, reversed(made)):
            os.rmdir(path)
        raise


def _missing_folders(folder: str) -> list[str]:
    """The folders to make, from the outermost."""
    missing: list[str] = []
    while folder and not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing[::-1]
