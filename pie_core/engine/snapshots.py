"""Named snapshots, by tenant: frozen contexts that hold their pages until they are deleted, taken or replaced.

They are never lost to make room: a tenant that saves too much is refused at saving, by number and by pages. Their pages
may be, when nothing else helps: then their rows are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pie_core.contracts.forward import Int32
from pie_core.engine.context import Context
from pie_core.engine.options import EngineOptions
from pie_core.errors import LimitExceeded, NotFound
from pie_core.ids import Tenant
from pie_core.kv_pages.context_pages import Cache, ContextPages


@dataclass(frozen=True, slots=True)
class Snapshot:
    context: Context  # nobody writes to it
    attachment: bytes


class Snapshots:
    def __init__(self, cache: Cache, options: EngineOptions) -> None:
        self._cache = cache
        self._options = options
        self._by_tenant: dict[Tenant, dict[str, Snapshot]] = {}
        self._holders = [np.zeros(pool.num_pages, np.int32) for pool in cache.pools]

    def save(self, context: Context, name: str, attachment: bytes) -> None:
        """Freezes a copy of the context under this name; one that had it is replaced."""
        kept = self._by_tenant.setdefault(context.tenant, {})
        self._refuse_too_much(context, name, kept, attachment)
        frozen = Context(
            id=context.id,
            process=context.process,
            tenant=context.tenant,
            stream=0,
            pages=ContextPages.empty(self._cache),
        )
        frozen.take_over(context)
        frozen.pages.drop_checkpoints()
        if name in kept:
            self._release(kept.pop(name))
        kept[name] = Snapshot(frozen, attachment)
        self._hold(frozen, 1)

    def open(self, tenant: Tenant, name: str, into: Context, *, take: bool) -> bytes:
        """Makes `into` a copy of a snapshot; the attachment. `take`: the snapshot is gone afterwards."""
        snapshot = self._find(tenant, name)
        into.take_over(snapshot.context)
        if take:
            self.delete(tenant, name)
        return snapshot.attachment

    def delete(self, tenant: Tenant, name: str) -> None:
        snapshot = self._find(tenant, name)
        del self._by_tenant[tenant][name]
        self._release(snapshot)

    def suspend_one(self) -> bool:
        """The pages of some snapshot are given up; opening it computes its rows again. False: none has any."""
        for kept in self._by_tenant.values():
            for snapshot in kept.values():
                if not snapshot.context.pages.is_empty:
                    self._hold(snapshot.context, -1)
                    snapshot.context.suspend()
                    return True
        return False

    def names(self, tenant: Tenant) -> list[str]:
        return sorted(self._by_tenant.get(tenant, {}))

    def _find(self, tenant: Tenant, name: str) -> Snapshot:
        snapshot = self._by_tenant.get(tenant, {}).get(name)
        if snapshot is None:
            known = ", ".join(repr(each) for each in self.names(tenant)[:10]) or "none"
            raise NotFound(f"no snapshot {name!r} of tenant {tenant!r}; there are: {known}")
        return snapshot

    def _refuse_too_much(
        self, context: Context, name: str, kept: dict[str, Snapshot], attachment: bytes
    ) -> None:
        limit = self._options.max_snapshots
        if name not in kept and len(kept) >= limit:
            raise LimitExceeded(
                f"tenant {context.tenant!r} has {limit} snapshots, the most allowed: delete some"
            )
        if len(attachment) > self._options.max_attachment_bytes:
            raise LimitExceeded(
                f"snapshot {name!r}: its attachment has {len(attachment)} bytes; "
                f"the limit is {self._options.max_attachment_bytes}"
            )
        for group, held in enumerate(self._holders):
            share = self._options.max_snapshot_share
            added = np.count_nonzero(held[context.pages.pages_of(group)] == 0)
            if np.count_nonzero(held) + added > share * len(held):
                raise LimitExceeded(
                    f"snapshot {name!r}: snapshots would hold more than {share:.0%} of the {len(held)} pages of "
                    f"cache group {self._cache.pools[group].name!r}: delete some"
                )

    def _release(self, snapshot: Snapshot) -> None:
        self._hold(snapshot.context, -1)
        snapshot.context.pages.release()

    def _hold(self, context: Context, change: int) -> None:
        for group, held in enumerate(self._holders):
            pages: Int32 = context.pages.pages_of(group)
            held[pages] += change
