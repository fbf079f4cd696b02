"""KV pages of a context by hand: reserved, written by forward passes, committed, released."""

from __future__ import annotations

from wit_world.imports import context as context_bindings
from wit_world.imports import pages as bindings

from inferlet.errors import InvalidRequest
from inferlet.host import Scoped, call, drop


class RawPages(Scoped):
    """What `Context.inner()` gives. While it is open, passes of the context write the pages reserved here in place.

    A pass behind the last one raises InvalidRequest, one that would write a page which a fork or a snapshot shares
    PageShared, and nothing has changed then. Generations step by step work; those that the engine runs are refused.
    """

    __slots__ = ("_context", "_handle")

    def __init__(self, context: context_bindings.Context) -> None:
        self._context = context
        self._handle: bindings.RawPages | None = call(bindings.RawPages.take, context)

    @property
    def is_open(self) -> bool:
        return self._handle is not None

    @property
    def page_size(self) -> int:
        """Tokens of one page."""
        return self._context.page_size()

    @property
    def committed_pages(self) -> int:
        """Pages at the beginning that stay as they are."""
        return self._open().committed()

    @property
    def working_pages(self) -> int:
        """Pages behind them, with and without tokens."""
        return self._open().working()

    @property
    def working_tokens(self) -> int:
        """Tokens written on working pages."""
        return self._open().working_rows()

    def reserve(self, count: int) -> None:
        """More working pages, now; raises OutOfPages if there are not enough."""
        call(self._open().reserve, count)

    def commit(self, count: int) -> None:
        """The first working pages, which must be full, stay as they are, and may be shared with other contexts."""
        call(self._open().commit, count)

    def release(self, count: int) -> None:
        """Gives the last working pages back; they must be empty, so truncate the context first."""
        call(self._open().release, count)

    def close(self) -> None:
        """Ends it: empty pages are given back, and passes take pages by themselves again."""
        if self._handle is not None:
            drop(self._handle)
            self._handle = None

    def _leave(self) -> None:
        self.close()

    def _open(self) -> bindings.RawPages:
        if self._handle is None:
            raise InvalidRequest(
                "these pages are managed by the engine again; call Context.inner() once more"
            )
        return self._handle

    # The names of pie 0.4

    tokens_per_page = page_size
    committed_page_count = committed_pages
    working_page_count = working_pages
    working_page_token_count = working_tokens
    reserve_working_pages = reserve
    commit_working_pages = commit
    release_working_pages = release
