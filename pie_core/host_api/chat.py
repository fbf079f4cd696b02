"""Chat conventions of the checkpoint: its template's tokens, and decoders of what the model writes."""

from __future__ import annotations

from dataclasses import dataclass

from pie_core.host_api.guest_state import ProgramState, ServedModel
from pie_core.sandbox.hosting import Interface
from pie_core.text.decoders import ChatDecoder, Event, ReasoningDecoder
from pie_core.text.tool_calls import ToolDecoder

interface = Interface("chat")


@dataclass(frozen=True, slots=True)
class HostDecoder:
    """A decoder of any kind as one resource."""

    decoder: ChatDecoder | ReasoningDecoder | ToolDecoder


interface.resource("decoder", HostDecoder)


@interface.function("stop-tokens")
def stop_tokens(guest: ProgramState, model: ServedModel) -> list[int]:
    return list(model.text.stop_tokens)


@interface.function("turn-tokens")
def turn_tokens(guest: ProgramState, model: ServedModel, role: str, text: str) -> list[int]:
    return model.text.turn_tokens(role, text)


@interface.function("tool-tokens")
def tool_tokens(guest: ProgramState, model: ServedModel, tools: str) -> list[int]:
    return model.text.tool_tokens(tools)


@interface.function("result-tokens")
def result_tokens(guest: ProgramState, model: ServedModel, name: str, content: str) -> list[int]:
    return model.text.result_tokens(name, content)


@interface.function("decoder.create")
def create(guest: ProgramState, model: ServedModel, kind: str) -> HostDecoder:
    return HostDecoder(model.text.decoder(kind))


@interface.function("decoder.feed")
def feed(guest: ProgramState, decoder: HostDecoder, tokens: list[int]) -> list[Event]:
    return decoder.decoder.feed(tokens)


@interface.function("decoder.finish")
def finish(guest: ProgramState, decoder: HostDecoder) -> list[Event]:
    return decoder.decoder.finish()


@interface.function("decoder.reset")
def reset(guest: ProgramState, decoder: HostDecoder) -> None:
    decoder.decoder.reset()
