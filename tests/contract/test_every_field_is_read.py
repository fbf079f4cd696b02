"""A field without a reader does not exist: changing any array of a batch changes what the dummy answers or keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pie_core.contracts.forward import (
    AttentionMasks,
    ForwardBatch,
    ForwardResult,
    MediaSpans,
    PageTable,
    PrefixGroups,
    ProbeKind,
    Probes,
    Samplers,
    StateTable,
    TokenRefs,
    last_accepted,
)
from pie_core.contracts.media import MediaItem
from pie_core.errors import ForwardError
from pie_core.ids import Ticket
from pie_core.testing.batches import FromTicket, Mask, Media, Probe, Request, Sample, Stepper
from pie_plugins.drivers.dummy.driver import DummyDriver
from pie_plugins.drivers.dummy.options import DummyOptions

OPTIONS = DummyOptions(
    groups=("paged", "window", "state"),
    window=9,
    page_size=4,
    num_pages=64,
    position_axes=3,
    max_batch_requests=8,
    vocab_size=96,
)
ADAPTERS = (Path(__file__), Path(__file__).with_name("test_drivers.py"))  # any two files will do
RIVALS = [(3, 80.0), (5, 50.0)]  # these two tokens compete, and a penalty decides
ITEM = MediaItem("image", b"key", 6, 6, (1, 2, 3), {"pixels": np.arange(6.0)})


@dataclass(frozen=True)
class Known:
    """What the driver is found to sample, so that the batch can refer to it."""

    draft: int  # before the draft of the last request: as that draft it is accepted, and can be lost
    sampled: int  # by sampler 3 of the open step


@dataclass(frozen=True)
class Scene:
    """A driver with an open step behind it, and a batch that uses everything there is."""

    driver: DummyDriver
    open_ticket: Ticket
    batch: ForwardBatch


def scene(known: Known) -> Scene:
    driver = DummyDriver(OPTIONS, OPTIONS.vocab_size)
    stepper = Stepper(driver)
    for adapter in (0, 1):
        driver.load_adapter(adapter, ADAPTERS[adapter])
    handles = [driver.encode_media(ITEM), driver.encode_media(replace(ITEM, kind="audio"))]
    contexts = [stepper.context() for _ in range(4)]
    stepper.run([Request(context, [context.id, 2, 3, 4, 5, 6]) for context in contexts])
    contexts.append(stepper.fork(contexts[1]))
    first = Request(contexts[0], [6, 7, 8], drafts=2, samples=[Sample(0), Sample(1), Sample(2)])
    second = Request(contexts[3], [9, 10], samples=[Sample()])
    ticket = stepper.submit([first, second])
    requests = [
        Request(
            contexts[0],
            [FromTicket(ticket, last_accepted(0)), 11],
            samples=[Sample(temperature=5.0, stream=3)],
            proposals=2,
        ),
        Request(
            contexts[1],
            [12, FromTicket(ticket, 3), 14, 15, 16, 17],
            positions=[(6, 6, 6), (7, 8, 9), (9, 8, 7), (10, 10, 10), (11, 11, 11), (12, 12, 12)],
            masks=[Mask(4, [(1, 3), (5, 9)]), Mask(5, [(0, 4)], group=1), Mask(0, [(2, 12)], causal=False)],
            media=[Media(2, handles[0], 1, 2)],
            adapter=0,
            adapter_scale=0.5,
            samples=[
                Sample(temperature=5.0, top_k=9, stream=4),
                Sample(temperature=5.0, top_p=0.6, min_p=0.001, stream=5),
                Sample(2, bias=RIVALS, presence=2.0, frequency=2.0, history=[3]),
                *(Sample(2, repetition=1.1, history=range(half, 96, 2)) for half in (0, 1)),
                Sample(2, bias=RIVALS[::-1], presence=90.0, history=[3]),
                Sample(
                    2, bias=[(known.sampled, 50.0), (5, 45.0)], presence=90.0, history=[FromTicket(ticket, 3)]
                ),
                Sample(3, temperature=5.0, bias=[(3, 4.0), (5, 1.0)], allowed=range(0, 96, 2)),
                Sample(3, temperature=9.0, stream=6, allowed=[40]),
            ],
            probes=[
                Probe(ProbeKind.LOGITS, 0),
                Probe(ProbeKind.DISTRIBUTION, 1, temperature=0.5, k=3),
                Probe(ProbeKind.LOGPROBS, 2, tokens=[1, 2]),
                Probe(ProbeKind.LOGPROBS, 3, tokens=[3]),
                Probe(ProbeKind.ENTROPY, 4),
                Probe(ProbeKind.HIDDEN, 5),
            ],
        ),
        Request(contexts[4], [21]),
        Request(contexts[2], [18, 19, 20], drafts=1, samples=[Sample(1, temperature=5.0), Sample(2)]),
    ]
    for request in requests:
        stepper.make_room(request.context, len(request.tokens))
    batch = stepper.grouped(requests, [(1, 3, OPTIONS.page_size)])
    return Scene(driver, ticket, _with_draft(batch, known.draft))


def _with_draft(batch: ForwardBatch, draft: int) -> ForwardBatch:
    ids = batch.tokens.ids.copy()
    ids[-1] = draft
    return replace(batch, tokens=replace(batch.tokens, ids=ids))


@cache
def known() -> Known:
    draft = int(answer(scene(Known(0, 0))).tokens[-2])
    blank = scene(Known(0, 0))
    return Known(draft, int(blank.driver.collect(blank.open_ticket).tokens[3]))


def answer(scene: Scene) -> ForwardResult:
    own = scene.driver.submit(scene.batch)
    scene.driver.collect(scene.open_ticket)
    return scene.driver.collect(own)


def observed(scene: Scene) -> list[Any]:
    """The answer, and everything that is left on pages and in slots; None where the batch is refused as a whole."""
    result = answer(scene)
    values = [
        getattr(result, field.name) for field in fields(result) if field.name not in ("ticket", "busy_s")
    ]
    kept = [
        scene.driver.export_pages(group, range(OPTIONS.num_pages)) for group in range(len(OPTIONS.groups))
    ]
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in (*values, *kept)]


def arrays(part: Any, path: str = "") -> Iterator[str]:
    """The path of every array of a batch."""
    if isinstance(part, np.ndarray):
        yield path
    for field in fields(part) if is_dataclass(part) else ():
        yield from arrays(getattr(part, field.name), f"{path}.{field.name}".lstrip("."))
    for place, table in enumerate(part if isinstance(part, tuple) else ()):
        yield from arrays(table, f"{path}.{place}")


def with_array(part: Any, path: str, new: NDArray[Any]) -> Any:
    """A copy in which one array is another."""
    if not path:
        return new
    name, _, rest = path.partition(".")
    if isinstance(part, tuple):
        place = int(name)
        return (*part[:place], with_array(part[place], rest, new), *part[place + 1 :])
    return replace(part, **{name: with_array(getattr(part, name), rest, new)})


def array_at(part: Any, path: str) -> NDArray[Any]:
    for name in path.split("."):
        part = part[int(name)] if isinstance(part, tuple) else getattr(part, name)
    assert isinstance(part, np.ndarray)
    return part


PATHS = list(arrays(scene(Known(0, 0)).batch))
STEPS: dict[str, tuple[float, ...]] = {
    "i": (1, 2, -1, 29),
    "u": (1, 2, 29),
    "f": (0.5, -0.25, 3.0, 30.0),
    "b": (1,),
}


def neighbours(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The array with one element a little different, for every element."""
    for element in range(array.size):
        for step in STEPS[array.dtype.kind]:
            new = array.copy()
            new.flat[element] = not new.flat[element] if array.dtype.kind == "b" else new.flat[element] + step
            yield new


def is_noticed(path: str, new: NDArray[Any], expected: list[Any]) -> bool:
    """Whether the driver answers otherwise; a batch that it cannot read at all proves nothing."""
    changed = scene(known())
    try:
        return observed(replace(changed, batch=with_array(changed.batch, path, new))) != expected
    except (ForwardError, IndexError, ValueError):
        return False


def test_the_same_batch_is_answered_alike_and_uses_everything() -> None:
    result = answer(scene(known()))
    assert observed(scene(known())) == observed(scene(known()))
    assert result.failed == {}
    assert result.accepted.tolist() == [0, 0, 0, 1]
    assert len(result.draft_tokens) == 2
    empty = [path for path in PATHS if not array_at(scene(Known(0, 0)).batch, path).size]
    assert empty == []


@pytest.mark.parametrize("path", PATHS)
def test_a_field_is_read(path: str) -> None:
    start = scene(known())
    expected = observed(start)
    assert any(is_noticed(path, new, expected) for new in neighbours(array_at(start.batch, path)))


def test_every_kind_of_part_is_among_them() -> None:
    declared = {
        *(ForwardBatch, TokenRefs, PageTable, StateTable, AttentionMasks, Samplers, Probes, MediaSpans),
        PrefixGroups,
    }
    names = {field.name for kind in declared for field in fields(kind)}
    holders = {"cache", "tokens", "masks", "samplers", "probes", "media", "history", "prefixes"}
    assert {path.rpartition(".")[2] for path in PATHS} == names - holders | {"tokens"}
