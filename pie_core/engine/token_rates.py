"""How many tokens the programs of a tenant may feed and draw in a minute: a bucket for each, looked at on request.

What steps draw is counted by process anyway; here it is only read, when somebody asks for more.
"""

from __future__ import annotations

from collections.abc import Callable

from pie_core.engine.tally import Tally
from pie_core.errors import LimitExceeded
from pie_core.ids import ProcessId, Tenant


class _Bucket:
    """Tokens of one tenant: `used` runs out at a steady rate."""

    __slots__ = ("ended", "processes", "seen", "time", "used")

    def __init__(self, time: float) -> None:
        self.processes: set[ProcessId] = set()
        self.ended = 0  # tokens of processes that are gone
        self.seen = 0  # ... of all of them, when it was last looked at
        self.time = time
        self.used = 0.0


class TokenRates:
    def __init__(self, per_minute: int | None, tokens: Tally, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._tokens = tokens
        self._clock = clock
        self._tenants: dict[Tenant, _Bucket] = {}

    def check(self, process: ProcessId, tenant: Tenant) -> None:
        """Raises LimitExceeded once the tenant has used up what a minute brings; what runs goes on."""
        if self._per_minute is None:
            return
        bucket = self._tenants.get(tenant) or self._begin(tenant)
        bucket.processes.add(process)
        self._bring_up_to_date(bucket, self._per_minute / 60)
        if bucket.used >= self._per_minute:
            raise LimitExceeded(
                f"{tenant!r} has fed and drawn {bucket.used:.0f} tokens that count at the moment; the limit is"
                f" {self._per_minute} in a minute (limits.tokens_per_minute_per_tenant of the model): wait a little"
            )

    def forget_process(self, process: ProcessId) -> None:
        """Its tokens, about to be forgotten, still count."""
        for tenant, bucket in list(self._tenants.items()):
            if process in bucket.processes:
                bucket.processes.remove(process)
                bucket.ended += self._tokens[process]
                self._forget_if_idle(tenant, bucket)

    def _begin(self, tenant: Tenant) -> _Bucket:
        for other, idle in list(self._tenants.items()):
            self._forget_if_idle(other, idle)
        bucket = self._tenants[tenant] = _Bucket(self._clock())
        return bucket

    def _forget_if_idle(self, tenant: Tenant, bucket: _Bucket) -> None:
        if not bucket.processes and self._per_minute is not None:
            self._bring_up_to_date(bucket, self._per_minute / 60)
            if bucket.used == 0:
                del self._tenants[tenant]

    def _bring_up_to_date(self, bucket: _Bucket, per_second: float) -> None:
        now = self._clock()
        total = bucket.ended + sum(self._tokens[process] for process in bucket.processes)
        drained = max(bucket.used - (now - bucket.time) * per_second, 0.0)
        bucket.used = drained + total - bucket.seen
        bucket.time, bucket.seen = now, total
