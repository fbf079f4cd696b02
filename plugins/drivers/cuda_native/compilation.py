"""Compiles kernels on all processors at once: a GPU's own code, and the code on the host that launches it.

A kernel is compiled anew for every combination of its constants, of the types of its arguments, and of which of them
are divisible by 16. Left alone, that happens at the first launch of each, one behind the other. What is compiled lies
in Triton's cache on the disk (`TRITON_CACHE_DIR`), where the next start finds it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from threading import Thread
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from pie_core.contracts.driver import Progress, ProgressCallback
from pie_core.errors import PieError
from pie_plugins.drivers.cuda_native.triton_launches import rehearsing

LOG = logging.getLogger(__name__)
ALIGNED = 16  # bytes of a pointer, or a number's factor, that kernels are specialized on
LOOKS_EACH = 0.2  # seconds between two reports of progress


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """What is launched inside is compiled instead; at the end all of it is there."""
    with _Processors(device) as processors, processors.compiling():
        yield


class Compilation:
    """What `launches` launches, compiled in the background."""

    def __init__(self, device: torch.device, launches: Callable[[], None]) -> None:
        self._processors = _Processors(device)
        self._thread = Thread(target=self._run, args=(launches,), name="pie-compilation", daemon=True)
        self._thread.start()

    def wait(self, progress: ProgressCallback) -> None:
        """Until all of it is there, and tells how far that is."""
        while self._thread.is_alive():
            processors = self._processors
            progress(Progress("compiling kernels", processors.done, processors.begun, "kernels"))
            self._thread.join(LOOKS_EACH)

    def abandon(self) -> None:
        """What has not begun is left."""
        self._processors.is_abandoned = True

    def _run(self, launches: Callable[[], None]) -> None:
        try:
            with self._processors as processors, processors.compiling():
                launches()
        except PieError:
            return  # such a model is not loaded at all, and whoever loads it says why
        except Exception as error:
            # An operation of the model needs content. Its kernels are compiled where they are launched.
            LOG.warning(
                "kernels could not all be compiled in advance, so loading takes longer: %s: %s",
                type(error).__name__,
                error,
            )


class _Processors(Executor):
    """Threads that compile and load: most of it runs outside of Python, in LLVM, ptxas and the C compiler."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.empty(0, device=device).get_device()
        self.begun = self.done = 0
        self.is_abandoned = False
        self._pool = ThreadPoolExecutor(initializer=partial(torch.cuda.set_device, self._device))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.begun += 1
        return self._pool.submit(self._compiled, partial(fn, *args, **kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Launches of this thread become work for the others. What cannot be compiled raises where it is launched."""
        seen: set[Hashable] = set()

        def told(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
            key = variant(kernel, arguments, constants)
            if key not in seen:
                seen.add(key)
                kernel.warmup(*arguments, grid=(1,), **constants)

        with (
            torch.cuda.device(self._device),
            triton.AsyncCompileMode(self, ignore_errors=True),
            rehearsing(told, torch.device("cuda", self._device)),
        ):
            yield

    def _compiled(self, compile_it: Callable[[], Any]) -> Any:
        if self.is_abandoned:
            raise CancelledError
        try:
            kernel = compile_it()
            with suppress(OutOfResources):  # a tiling that does not fit; its launch says so
                kernel.run  # noqa: B018 - loads it, and builds what launches it
            return kernel
        finally:
            self.done += 1


def variant(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Hashable:
    """Launches for which this is the same share what was compiled."""
    kinds = tuple(map(_kind, arguments, _are_specialized(kernel)))
    return kernel.__name__, kinds, tuple(constants.items())


@cache
def _are_specialized(kernel: Any) -> tuple[bool, ...]:
    """Each argument: whether its value counts."""
    interpreted: dict[str, Any] | None = getattr(kernel, "kwargs", None)
    loose = kernel.do_not_specialize if interpreted is None else interpreted["do_not_specialize"]
    return tuple(name not in (loose or ()) for name in kernel.arg_names)


def _kind(argument: Any, is_specialized: bool) -> Hashable:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % ALIGNED == 0
    if isinstance(argument, int):
        special = (argument == 1, argument % ALIGNED == 0) if is_specialized else ()
        return argument.bit_length() > 31, special
    return type(argument).__name__
