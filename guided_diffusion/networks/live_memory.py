"""Counting the memory of tensors without allocating or computing anything."""

import contextlib
import weakref
from typing import Any

import torch as th
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def fake_tensors() -> contextlib.AbstractContextManager:
    """The context in which networks are built and called for `LiveTensors`.

    Unlike meta tensors, fake ones claim to be on a device, so that the code for that device runs.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


class LiveTensors(TorchDispatchMode):
    """Sums up the bytes of all tensors created in the context, until they are freed.

    What kernels allocate for themselves, and what an allocator wastes, is not counted.

    peak: the most memory at a time. kept: what the process keeps once no tensor is left.

    :param kept_below: tensors smaller than this leave their memory to the process when they are
        freed, but only to others smaller than this; see `runtime.memory.keep_freed_memory`.
    """

    def __init__(self, kept_below: int = 0) -> None:
        super().__init__()
        self.kept_below = kept_below
        self.small = self.large = self.kept = self.peak = 0
        self._known: weakref.WeakKeyDictionary[th.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def restart_peak(self) -> None:
        """Let `peak` be the most from now on."""
        self.peak = self.kept + self.large

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, th.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: th.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self._change(size, size)
        weakref.finalize(storage, self._change, size, -size)

    def _change(self, size: int, by: int) -> None:
        if size < self.kept_below:
            self.small += by
            self.kept = max(self.kept, self.small)
        else:
            self.large += by
        self.peak = max(self.peak, self.kept + self.large)
