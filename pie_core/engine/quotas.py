"""What a program, and the programs of a tenant together, may have and use: contexts, open requests, tokens, pages."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from pie_core.contracts.forward import Int32
from pie_core.engine.context import Context
from pie_core.engine.messages import Forward, Generate, ProcessUse, Step
from pie_core.engine.options import EngineOptions
from pie_core.engine.tally import Tally
from pie_core.engine.token_rates import TokenRates
from pie_core.errors import LimitExceeded
from pie_core.ids import ProcessId, RequestId, Tenant
from pie_core.kv_pages.context_pages import Cache

_LIMITED = {
    "contexts_per_program": "contexts",
    "contexts_per_tenant": "contexts",
    "requests_per_program": "open requests",
    "requests_per_tenant": "open requests",
    "tokens_per_program": "tokens in all",
    "page_share_per_program": "pages",
    "page_share_per_tenant": "pages",
}


class Quotas:
    """Counts what is there, and refuses one more by type before anything has changed."""

    def __init__(
        self, options: EngineOptions, cache: Cache, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._options = options
        self._cache = cache
        self._contexts: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self.tokens = Tally()  # by process
        self._rates = TokenRates(options.max_tokens_per_minute_per_tenant, self.tokens, clock)
        self._open: dict[RequestId, Context] = {}

    def add_context(self, process: ProcessId, tenant: Tenant) -> None:
        """Raises LimitExceeded; the context counts until `remove_context`."""
        counts, options = self._contexts, self._options
        _refuse_beyond(
            "contexts_per_program", process, counts[_of(process)] + 1, options.max_contexts_per_process
        )
        _refuse_beyond(
            "contexts_per_tenant", tenant, counts[_at(tenant)] + 1, options.max_contexts_per_tenant
        )
        counts.update((_of(process), _at(tenant)))

    def remove_context(self, context: Context) -> None:
        self._contexts.subtract((_of(context.process), _at(context.tenant)))

    def add_request(
        self, command: Forward | Generate | Step, context: Context, contexts: Iterable[Context]
    ) -> None:
        """Raises LimitExceeded; the request counts as open until `end_request`."""
        options, process, tenant = self._options, context.process, context.tenant
        counts = self._requests
        _refuse_beyond(
            "requests_per_program", process, counts[_of(process)] + 1, options.max_requests_per_process
        )
        _refuse_beyond(
            "requests_per_tenant", tenant, counts[_at(tenant)] + 1, options.max_requests_per_tenant
        )
        count = 1 if isinstance(command, Step) else len(command.tokens)
        tokens = self.tokens[process] + count
        _refuse_beyond("tokens_per_program", process, tokens, options.max_tokens_per_process)
        self._rates.check(process, tenant)
        self.refuse_too_many_pages(context, count, contexts)
        self._open[command.request] = context
        counts.update((_of(process), _at(tenant)))
        self.tokens.add(process, count)

    def end_request(self, request: RequestId) -> None:
        context = self._open.pop(request, None)
        if context is not None:
            self._requests.subtract((_of(context.process), _at(context.tenant)))

    def count_generated(self, request: RequestId, count: int) -> None:
        context = self._open.get(request)
        if context is not None:
            self.tokens.add(context.process, count)

    def tokens_left(self, process: ProcessId) -> int | None:
        limit = self._options.max_tokens_per_process
        return None if limit is None else max(limit - self.tokens[process], 0)

    def forget_process(self, process: ProcessId) -> None:
        self._rates.forget_process(process)
        self.tokens.forget(process)

    def uses(self, contexts: Iterable[Context]) -> list[ProcessUse]:
        """Of each process that has contexts."""
        pages: Counter[ProcessId] = Counter()
        requests: Counter[ProcessId] = Counter()  # those of loops are not among the counted ones
        for context in contexts:
            pages[context.process] += sum(context.pages.num_pages)
            requests[context.process] += context.busy + len(context.waiting)
        return [
            ProcessUse(
                process=process,
                contexts=self._contexts[_of(process)],
                pages=count,
                open_requests=requests[process],
                tokens=self.tokens[process],
            )
            for process, count in pages.items()
        ]

    @property
    def counts_requests(self) -> bool:
        """Whether more than tokens is limited, and each request has to be looked at."""
        options = self._options
        shares = (options.max_page_share_per_process, options.max_page_share_per_tenant)
        limits = (options.max_requests_per_process, options.max_requests_per_tenant)
        rate = options.max_tokens_per_minute_per_tenant
        return min(shares) < 1 or limits != (None, None) or rate is not None

    @property
    def may_refuse(self) -> bool:
        """Whether a token more has to be looked at before it is fed."""
        return self.counts_requests or self._options.max_tokens_per_process is not None

    def refuses_some(self, numbers: Int32) -> bool:
        """Whether one more token for each of these processes, by number, has to be looked at one by one."""
        limit = self._options.max_tokens_per_process
        if self.counts_requests:
            return True
        return limit is not None and len(self.tokens.exceeding(numbers, limit)) > 0

    def refuse_too_many_pages(self, context: Context, count: int, contexts: Iterable[Context]) -> None:
        """Raises LimitExceeded if `count` more rows take too many."""
        shares = (self._options.max_page_share_per_process, self._options.max_page_share_per_tenant)
        if min(shares) >= 1:
            return
        for group, (space, pool) in enumerate(zip(self._cache.spaces, self._cache.pools, strict=True)):
            if space.group.kind not in ("paged", "latent"):
                continue
            added = -(-(context.length + count) // space.page_size) - context.claimed_pages(group)
            held = [(each, each.claimed_pages(group)) for each in contexts]
            mine = sum(pages for each, pages in held if each.process == context.process)
            ours = sum(pages for each, pages in held if each.tenant == context.tenant)
            most = [int(share * pool.num_pages) for share in shares]
            _refuse_beyond("page_share_per_program", context.process, mine + added, most[0], pool.name)
            _refuse_beyond("page_share_per_tenant", context.tenant, ours + added, most[1], pool.name)


def _of(process: ProcessId) -> str:
    return f"process {process}"


def _at(tenant: Tenant) -> str:
    return f"tenant {tenant}"


def _refuse_beyond(option: str, owner: str, count: int, limit: int | None, group: str = "") -> None:
    """`option` is what the limit is called in the configuration of a model."""
    if limit is not None and count > limit:
        what = _LIMITED[option] + (f" of cache group {group!r}" if group else "")
        raise LimitExceeded(
            f"{owner!r} would have {count} {what}; the limit is {limit} (limits.{option} of the model)"
        )
