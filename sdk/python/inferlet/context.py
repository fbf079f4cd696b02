"""A token history on KV pages, and the turns and tokens that wait to be appended to it (the buffer).

The host owns both. This side holds back two things for speed: the last token of a stepped generation, and the
generation that runs inside the engine. `settled()` hands both over, so every other call begins with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Unpack

from wit_world.imports import context as bindings

from inferlet import chat, runtime, tools
from inferlet.errors import InvalidRequest, not_in_this_version
from inferlet.forward import Forward
from inferlet.generation import EngineLoop, GenerateOptions, Generator
from inferlet.host import Scoped, call, drop, finish
from inferlet.model import Model
from inferlet.pages import RawPages

if TYPE_CHECKING:
    from inferlet.sample import Sampler


_LOWEST_BID = 1000  # how far below the program's own priority a bid of 0 is


class Context(Scoped):
    """A conversation or text in progress. Fillers return the context, so that they chain."""

    __slots__ = ("_bid", "_buffered", "_engine_loop", "_handle", "_inner", "_model", "_staged")

    def __init__(self, model: Model) -> None:
        self._model = model
        self._handle: bindings.Context | None = call(bindings.Context.create, model._handle)
        self._buffered = False
        self._bid: float | None = None
        self._inner: RawPages | None = None
        self._staged: list[int] = []
        self._engine_loop: EngineLoop | None = None

    @classmethod
    def _adopt(cls, model: Model, handle: bindings.Context) -> Context:
        context = cls.__new__(cls)
        context._model = model
        context._handle = handle
        context._buffered = True
        context._bid = None
        context._inner = None
        context._staged = []
        context._engine_loop = None
        return context

    @classmethod
    def open(cls, model: Model, name: str) -> Context:
        """A copy of a saved snapshot."""
        return cls._adopt(model, call(bindings.Context.open, model._handle, name))

    @classmethod
    def take(cls, model: Model, name: str) -> Context:
        """Like open, and the snapshot is gone."""
        return cls._adopt(model, call(bindings.Context.take, model._handle, name))

    @staticmethod
    def delete(model: Model, name: str) -> None:
        """Deletes a snapshot."""
        call(bindings.Context.delete, model._handle, name)

    def fork(self) -> Context:
        """A branch that shares every page written so far; the buffer is copied too."""
        branch = self._adopt(self._model, call(self.settled().fork))
        branch._bid = self._bid
        return branch

    def save(self, name: str) -> None:
        """Saves under a name, replacing what had it; it outlives the program."""
        call(self.settled().save, name)

    def snapshot(self) -> str:
        """Saves under a fresh name and returns it."""
        return call(self.settled().snapshot)

    def release(self) -> None:
        """Frees the pages now; the context cannot be used afterwards."""
        if self._handle is not None:
            self._interrupt()
            if self._inner is not None:
                self._inner.close()
            self._handle.release()
            drop(self._handle)
            self._handle = None

    destroy = release

    def _leave(self) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self._handle is None else f"{self._handle.length()} tokens"
        return f"Context({self._model.name!r}, {state})"

    # What it holds

    @property
    def model(self) -> Model:
        return self._model

    @property
    def page_size(self) -> int:
        """Tokens of one KV page."""
        return self._alive().page_size()

    @property
    def seq_len(self) -> int:
        """Tokens written so far, without the buffer."""
        return self.settled().length()

    @property
    def position(self) -> int:
        """The position that the next token gets."""
        return self.settled().position()

    def tokens(self) -> list[int]:
        """The tokens written so far, without the buffer."""
        return list(call(self.settled().tokens))

    def buffer(self) -> list[int]:
        """The tokens that wait to be written, turns rendered by the checkpoint's template."""
        return list(call(self.settled().buffer))

    def drain(self) -> list[int]:
        """Empties the buffer and returns what it held, for a pass of the program's own."""
        self._buffered = False
        return list(call(self.settled().drain))

    # Fillers

    def system(self, message: str) -> Context:
        return self._add("system", message)

    def user(self, message: str) -> Context:
        return self._add("user", message)

    def assistant(self, message: str) -> Context:
        return self._add("assistant", message)

    def equip(self, functions: Sequence[tools.Description]) -> Context:
        """Describes tools to the model as its template does, in front of everything else."""
        call(self.settled().equip, tools.descriptions(functions))
        self._buffered = True
        return self

    def tool_call(self, name: str, arguments: str | Mapping[str, Any], call_id: str = "") -> Context:
        """A call in the assistant's turn that the program makes in the model's stead."""
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        call(self.settled().add_tool_call, name, text, call_id)
        self._buffered = True
        return self

    def tool_result(self, name: str, value: Any, call_id: str = "") -> Context:
        """What a tool answered: to the call of this id, else to the first of its name that has no answer yet."""
        call(self.settled().add_tool_result, name, tools.result_text(value), call_id)
        self._buffered = True
        return self

    def _add(self, role: str, message: str) -> Context:
        call(self.settled().add_text, role, message)
        self._buffered = True
        return self

    def cue(self) -> Context:
        """Opens the assistant's turn; a second cue in a row changes nothing."""
        call(self.settled().cue)
        self._buffered = True
        return self

    def seal(self) -> Context:
        """Ends the assistant's turn with the template's own tokens."""
        call(self.settled().seal)
        self._buffered = True
        return self

    def append(self, tokens: Iterable[int]) -> Context:
        """Adds tokens as they are."""
        call(self.settled().append, list(tokens))
        self._buffered = True
        return self

    def truncate(self, count: int) -> None:
        """Drops the last `count` written tokens, and the whole buffer."""
        call(self.settled().truncate, count)
        self._buffered = False

    def evict(self, start: int, end: int) -> None:
        """No new token reads the written tokens from `start` to `end` any more, and their pages are freed.

        A page goes when all its tokens are evicted. `seq_len`, positions and `tokens()` stay as they are.
        """
        call(self.settled().evict, start, end)

    def pin(self, start: int, end: int) -> None:
        """Keeps the written tokens from `start` to `end` from later evictions."""
        call(self.settled().pin, start, end)

    def inner(self) -> RawPages:
        """Its KV pages, to reserve, commit and release by hand until they are closed."""
        handle = self.settled()
        if self._inner is None or not self._inner.is_open:
            self._inner = RawPages(handle)
        return self._inner

    def set_priority(self, value: int) -> Context:
        """Of its passes and generations from now on: higher ones go first, and give their pages up last.

        0 as a rule; negative ones are for what may wait. `runtime.priority()` is the most that the program may ask for.
        """
        call(self.settled().priority, value)
        return self

    def append_image(self, image: Any) -> Context:
        raise not_in_this_version("Context.append_image")

    def append_images(self, images: Sequence[Any]) -> Context:
        raise not_in_this_version("Context.append_images")

    def append_audio(self, clip: Any) -> Context:
        raise not_in_this_version("Context.append_audio")

    def append_audios(self, clips: Sequence[Any]) -> Context:
        raise not_in_this_version("Context.append_audios")

    def append_video(self, video: Any) -> Context:
        raise not_in_this_version("Context.append_video")

    def set_bid(self, value: float) -> None:
        """A bid of 0.4 as a priority below the program's own: the higher the bid, the nearer to it."""
        if not value >= 0:
            raise InvalidRequest(f"a bid of {value}: expected 0 or more")
        self._bid = value
        self.set_priority(runtime.priority() - round(_LOWEST_BID / (1 + value)))

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Bids nothing for a while: `with ctx.idle(): …`."""
        bid = self._bid
        self.set_bid(0)
        try:
            yield
        finally:
            self._bid = bid
            if bid is None:
                self.set_priority(runtime.priority())
            else:
                self.set_bid(bid)

    # Passes

    async def flush(self) -> None:
        """Writes the buffer's KV; other tasks of the program run meanwhile."""
        handle = self.settled()
        if self._buffered:
            pending = call(handle.flush)
            await finish(pending.pollable, pending.finish, pending.cancel)
            self._buffered = False

    def forward(self) -> Forward:
        """A pass to describe and execute; the buffer is not part of it."""
        return Forward(self)

    def generate(
        self, sampler: Sampler, *, auto_flush: bool = True, **options: Unpack[GenerateOptions]
    ) -> Generator:
        """A generation from here. auto_flush: cue the assistant first, and stop where its turn ends."""
        if auto_flush:
            self.cue()
            if options.get("stop") is None:
                options["stop"] = chat.stop_tokens(self._model)
        return Generator(self, sampler, **options)

    # What this side holds back

    def settled(self) -> bindings.Context:
        """The host's context, once it knows everything that this side held back."""
        self._interrupt()
        handle = self._alive()
        if self._staged:
            call(handle.append, self._staged)
            self._staged = []
            self._buffered = True
        return handle

    def stage(self, tokens: list[int]) -> None:
        """Holds generated tokens back: the next pass writes them after the buffer."""
        self._staged.extend(tokens)

    def take_inputs(self) -> tuple[bindings.Context, list[int]]:
        """The host's context, and what the next pass of a generation has to write: buffer and staged tokens."""
        self._interrupt()
        handle = self._alive()
        inputs = list(call(handle.drain)) + self._staged if self._buffered else self._staged
        self._buffered = False
        self._staged = []
        if not inputs:
            call(handle.take_back)  # it was flushed: its last token is fed again
            inputs = list(call(handle.drain))
        return handle, inputs

    def start_engine_loop(
        self,
        sampler: Sampler,
        max_tokens: int,
        stop: Iterable[int],
        timeout: float | None = None,
        priority: int | None = None,
        whole: bool = False,
    ) -> EngineLoop:
        """Hands the decoding loop to the engine until it ends or this context is used otherwise."""
        engine_loop = EngineLoop(self.settled(), sampler, max_tokens, stop, timeout, priority, whole)
        self._buffered = True
        self._engine_loop = engine_loop
        return engine_loop

    def _interrupt(self) -> None:
        if self._engine_loop is not None:
            engine_loop, self._engine_loop = self._engine_loop, None
            engine_loop.interrupt()

    def _alive(self) -> bindings.Context:
        if self._handle is None:
            raise InvalidRequest("this context was released; open or create another one")
        return self._handle
