"""Named snapshots, by tenant: frozen contexts that hold their pages until they are deleted, taken or replaced.

They are never lost to make room: a tenant that saves too much is refused at saving, by number and by pages. Their pages
are given up when nothing else helps, like those of contexts. With a folder, they outlive the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pie_core.contracts.forward import Int32
from pie_core.engine.context import Context
from pie_core.engine.options import EngineOptions
from pie_core.engine.snapshot_files import SnapshotFiles
from pie_core.errors import LimitExceeded, NotFound
from pie_core.ids import ContextId, ProcessId, Tenant
from pie_core.kv_pages.context_pages import Cache, ContextPages


@dataclass(frozen=True, slots=True)
class Snapshot:
    context: Context  # nobody writes to it
    attachment: bytes
    saved_at: float  # seconds since 1970


class Snapshots:
    def __init__(
        self, cache: Cache, options: EngineOptions, weights: str, now: Callable[[], float] = time.time
    ) -> None:
        self._cache = cache
        self._options = options
        self._now = now
        self._by_tenant: dict[Tenant, dict[str, Snapshot]] = {}
        self._holders = [np.zeros(pool.num_pages, np.int32) for pool in cache.pools]
        folder = options.snapshot_folder
        self._files = None if folder is None else SnapshotFiles(Path(folder), weights)
        self._read_changes()

    def save(self, context: Context, name: str, attachment: bytes) -> None:
        """Freezes a copy of the context under this name; one that had it is replaced."""
        self._bring_up_to_date()
        kept = self._by_tenant.setdefault(context.tenant, {})
        self._refuse_too_much(context, name, kept, attachment)
        frozen = self._empty(context.tenant)
        frozen.take_over(context)
        frozen.pages.drop_checkpoints()
        if name in kept:
            self._release(kept.pop(name))
        snapshot = kept[name] = Snapshot(frozen, attachment, self._now())
        self._hold(frozen, 1)
        if self._files is not None:
            self._files.write(frozen, name, attachment, snapshot.saved_at)

    def _empty(self, tenant: Tenant) -> Context:
        pages = ContextPages.empty(self._cache)
        return Context(id=ContextId(0), process=ProcessId(""), tenant=tenant, stream=0, pages=pages)

    def _bring_up_to_date(self) -> None:
        if self._options.shares_snapshot_folder:
            self._read_changes()
        self._drop_expired()

    def _read_changes(self) -> None:
        """Takes what is in the folder for what is saved: others of the model may have written and deleted there."""
        for tenant, name, stored in self._files.changes() if self._files is not None else ():
            kept = self._by_tenant.setdefault(tenant, {})
            if name in kept:
                self._release(kept.pop(name))
            if stored is not None:
                context = self._empty(tenant)
                stored.restore(context)
                kept[name] = Snapshot(context, stored.attachment, stored.header.saved_at)

    def _drop_expired(self) -> None:
        lifetime_s = self._options.snapshot_ttl_s
        if lifetime_s is None:
            return
        for tenant, kept in self._by_tenant.items():
            for name in [name for name, each in kept.items() if each.saved_at + lifetime_s <= self._now()]:
                self._remove(tenant, name)

    def open(self, tenant: Tenant, name: str, into: Context, *, take: bool) -> bytes:
        """Makes `into` a copy of a snapshot; the attachment. `take`: the snapshot is gone afterwards."""
        snapshot = self._find(tenant, name)
        into.take_over(snapshot.context)
        if take:
            self.delete(tenant, name)
        return snapshot.attachment

    def delete(self, tenant: Tenant, name: str, saved_before: float | None = None) -> None:
        """With a moment, only if it is older."""
        snapshot = self._find(tenant, name)
        if saved_before is None or snapshot.saved_at < saved_before:
            self._remove(tenant, name)

    def _remove(self, tenant: Tenant, name: str) -> None:
        self._release(self._by_tenant[tenant].pop(name))
        if self._files is not None:
            self._files.delete(tenant, name)

    def suspend_one(self, suspend: Callable[[Context], None]) -> bool:
        """Some snapshot gives its pages up, as contexts do. False: none has any."""
        for kept in self._by_tenant.values():
            for snapshot in kept.values():
                if not snapshot.context.pages.is_empty:
                    self._hold(snapshot.context, -1)
                    suspend(snapshot.context)
                    return True
        return False

    def saved(self, tenant: Tenant) -> dict[str, float]:
        """Names, and when each was saved, in seconds since 1970."""
        self._bring_up_to_date()
        return {name: each.saved_at for name, each in sorted(self._by_tenant.get(tenant, {}).items())}

    def _find(self, tenant: Tenant, name: str) -> Snapshot:
        self._bring_up_to_date()
        snapshot = self._by_tenant.get(tenant, {}).get(name)
        if snapshot is None:
            known = ", ".join(repr(each) for each in list(self.saved(tenant))[:10]) or "none"
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
