"""Every command and event encodes to MessagePack and comes back as it was, whatever is in its fields."""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from pie_core.contracts.driver import Feature
from pie_core.engine.messages import Command, Event, Message, ModelInfo

LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(1 << 63), (1 << 64) - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=20),
    bool: st.booleans(),
    type(None): st.none(),
    Feature: st.sampled_from(Feature),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Anything that an annotation of a message allows."""
    kind = getattr(kind, "__supertype__", kind)
    origin, args = get_origin(kind), get_args(kind)
    if kind in LEAVES:
        return LEAVES[kind]
    if origin in (Union, UnionType):
        return st.one_of(*map(values, args))
    if origin in (tuple, list, frozenset):
        return st.lists(values(args[0]), max_size=3).map(origin)
    return messages(kind)


def messages(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{name: values(hints[name]) for name in kind.__struct_fields__})


def test_every_message_is_a_command_or_an_event() -> None:
    assert {*get_args(Command), *get_args(Event)} == set(Message.__subclasses__())


@pytest.mark.parametrize("kind", [*get_args(Command), *get_args(Event)], ids=lambda kind: kind.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_message_survives_the_codec(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    union = Command if kind in get_args(Command) else Event
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=union) == message


def test_what_a_worker_knows_of_a_model_survives_the_codec() -> None:
    info = ModelInfo("m", "dummy", "llama", 97, 512, 16, frozenset({Feature.SWAP}))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=ModelInfo) == info
