"""Named snapshots: saved, opened, taken, replaced, listed and limited, per tenant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pie_core.engine.messages import (
    Ack,
    Command,
    DeleteSnapshot,
    EndProcess,
    EvictRows,
    Failed,
    ListSnapshots,
    OpenSnapshot,
    SaveSnapshot,
    SnapshotNames,
    SnapshotOpened,
)
from pie_core.ids import ContextId, ProcessId, Tenant
from tests.core.engine.stepping import RANDOM, E, SteppedEngine, dummy


class Shelf(SteppedEngine):
    """An engine with the snapshot commands of tenant "t" in one call each."""

    def ask(self, kind: type[E], command: Callable[..., Command], **fields: Any) -> E:
        request = self.new_request()
        self.send(command(request=request, **fields))
        self.run()
        return self.final(request, kind)

    def save(self, context: int, name: str, kind: type[E], attachment: bytes = b"") -> E:
        return self.ask(kind, SaveSnapshot, context=ContextId(context), name=name, attachment=attachment)

    def open(self, context: int, name: str, kind: type[E], tenant: str = "t", take: bool = False) -> E:
        return self.ask(
            kind,
            OpenSnapshot,
            context=ContextId(context),
            process=ProcessId("p"),
            tenant=Tenant(tenant),
            name=name,
            take=take,
        )

    def names(self, tenant: str = "t") -> list[str]:
        return self.ask(SnapshotNames, ListSnapshots, tenant=Tenant(tenant)).names

    def delete(self, name: str, kind: type[E]) -> E:
        return self.ask(kind, DeleteSnapshot, tenant=Tenant("t"), name=name)


def shelf(**options: Any) -> Shelf:
    made = Shelf(dummy(num_pages=32), **options)
    made.create(1)
    made.forward(1, [1, 2, 3, 4, 5, 6])
    return made


def test_a_snapshot_outlives_its_process_and_opens_as_a_context_of_its_own() -> None:
    engine = shelf()
    engine.save(1, "a", Ack, b"mine")
    expected = engine.draw(1, [7])
    engine.send(EndProcess(ProcessId("p")))
    opened = engine.open(2, "a", SnapshotOpened)
    assert (opened.length, opened.position, opened.attachment) == (6, 6, b"mine")
    assert engine.draw(2, [7]) == expected
    engine.open(3, "a", SnapshotOpened)
    assert engine.history(3) == [1, 2, 3, 4, 5, 6], "what was drawn on one copy is not on the next"


def test_every_opening_draws_from_noise_of_its_own() -> None:
    engine = shelf()
    engine.save(1, "a", Ack)
    engine.open(2, "a", SnapshotOpened)
    engine.open(3, "a", SnapshotOpened)
    assert len({tuple(engine.generate(context, [7], 12, RANDOM)) for context in (1, 2, 3)}) == 3


def test_a_taken_or_deleted_snapshot_is_gone_with_its_pages() -> None:
    engine = shelf()
    for name in ("a", "b"):
        engine.save(1, name, Ack)
    engine.open(2, "a", SnapshotOpened, take=True)
    engine.delete("b", Ack)
    assert engine.names() == []
    assert "no snapshot 'b'" in engine.delete("b", Failed).message
    engine.send(EndProcess(ProcessId("p")))
    assert engine.all_pages_are_free()


def test_saving_under_a_taken_name_replaces_what_had_it() -> None:
    engine = shelf()
    engine.save(1, "a", Ack)
    engine.forward(1, [9])
    engine.save(1, "a", Ack)
    assert engine.names() == ["a"]
    assert engine.open(2, "a", SnapshotOpened).length == 7


def test_tenants_do_not_see_each_others_snapshots() -> None:
    engine = shelf()
    engine.save(1, "a", Ack)
    assert engine.names("other") == []
    failed = engine.open(2, "a", Failed, tenant="other")
    assert (failed.code, "no snapshot 'a' of tenant 'other'" in failed.message) == ("not-found", True)
    assert "there is no context 2" in engine.refused(2).message


def test_saving_too_many_too_much_or_too_big_is_refused_and_keeps_what_was() -> None:
    engine = shelf(max_snapshots=2, max_snapshot_share=0.25, max_attachment_bytes=3)
    engine.save(1, "a", Ack)
    engine.save(1, "b", Ack)
    assert "has 2 snapshots" in engine.save(1, "c", Failed).message
    assert "4 bytes; the limit is 3" in engine.save(1, "b", Failed, b"1234").message
    engine.create(2)
    engine.forward(2, [0] * 30)
    failed = engine.save(2, "b", Failed)
    assert (failed.code, "more than 25% of the 32 pages" in failed.message) == ("limit-exceeded", True)
    assert engine.names() == ["a", "b"]
    assert engine.open(3, "b", SnapshotOpened).length == 6


def test_a_snapshot_lives_so_long_after_it_was_saved() -> None:
    engine = shelf(snapshot_ttl_s=10.0)
    engine.save(1, "a", Ack)
    engine.now = 6.0
    engine.save(1, "b", Ack)
    engine.now = 11.0
    assert engine.names() == ["b"]
    assert engine.open(2, "a", Failed).code == "not-found"
    engine.now = 20.0
    assert engine.names() == []
    engine.send(EndProcess(ProcessId("p")))
    assert engine.all_pages_are_free()


def in_folder(folder: Path, **options: Any) -> Shelf:
    return Shelf(dummy(num_pages=32, **options), snapshot_folder=str(folder))


def test_snapshots_in_a_folder_outlive_the_engine(tmp_path: Path) -> None:
    engine = in_folder(tmp_path)
    engine.create(1)
    engine.forward(1, [1, 2, 3, 4, 5], masks=tuple((0, row + 1) if row else (0, 1) for row in range(5)))
    engine.generate(1, [6], 5, RANDOM)
    engine.send(EvictRows(ContextId(1), 1, 4))
    for name in ("a", "b", "c"):
        engine.save(1, name, Ack, b"mine")
    engine.delete("b", Ack)
    expected = []
    engine.open(2, "a", SnapshotOpened)
    for _ in range(3):
        expected.append(engine.draw(2, [7], RANDOM))
    later = in_folder(tmp_path, page_size=2)
    assert later.names() == ["a", "c"]
    opened = later.open(2, "a", SnapshotOpened)
    assert (opened.length, opened.attachment) == (11, b"mine")
    assert later.history(2) == engine.history(1)
    assert [later.draw(2, [7], RANDOM) for _ in range(3)] == expected
    later.open(3, "c", SnapshotOpened, take=True)
    assert in_folder(tmp_path).names() == ["a"]


def test_files_that_are_damaged_or_of_other_weights_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = in_folder(tmp_path)
    engine.create(1)
    engine.forward(1, [1, 2, 3])
    for name in ("a", "b"):
        engine.save(1, name, Ack)
    assert in_folder(tmp_path, seed=9).names() == []
    assert "made with other weights" in caplog.text
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.write_bytes(b"no such format")
    assert in_folder(tmp_path).names() == []
    assert "its content is not what was written" in caplog.text


def test_engines_that_share_a_folder_have_one_anothers_snapshots(tmp_path: Path) -> None:
    first, second = (
        Shelf(dummy(num_pages=32), snapshot_folder=str(tmp_path), shares_snapshot_folder=True)
        for _ in range(2)
    )
    first.create(1)
    first.forward(1, [1, 2, 3])
    first.save(1, "a", Ack, b"first's")
    assert second.names() == ["a"]
    assert second.open(2, "a", SnapshotOpened).attachment == b"first's"
    assert second.draw(2, [7]) == first.draw(1, [7])
    second.save(2, "a", Ack, b"second's")
    opened = first.open(3, "a", SnapshotOpened)
    assert (opened.length, opened.attachment) == (4, b"second's")
    first.open(4, "a", SnapshotOpened, take=True)
    second.open(5, "a", Failed)
    assert first.names() == second.names() == []
    for engine in (first, second):
        engine.send(EndProcess(ProcessId("p")))
        engine.run()
        assert engine.all_pages_are_free()


def test_only_an_older_snapshot_is_deleted_if_a_moment_is_given() -> None:
    engine = Shelf(dummy(num_pages=32))
    engine.create(1)
    engine.forward(1, [1])
    engine.save(1, "a", Ack)
    listed = engine.ask(SnapshotNames, ListSnapshots, tenant=Tenant("t"))
    (saved_at,) = listed.saved_at
    engine.ask(Ack, DeleteSnapshot, tenant=Tenant("t"), name="a", saved_before=saved_at)
    assert engine.names() == ["a"]
    engine.ask(Ack, DeleteSnapshot, tenant=Tenant("t"), name="a", saved_before=saved_at + 1)
    assert engine.names() == []
