"""A small host in the test's own process: the modules that `componentize-py bindings` makes, with a scripted model.

The model's logits are a hash of the visible tokens, so whatever the SDK does wrong changes the tokens. Time is
virtual: a pass takes PASS_NS, and `poll.wait` and every suspending call move the clock.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any, Generic, TypeVar

PASS_NS = 10_000_000
ROLES = {"system": 256, "user": 257, "assistant": 258}
CUE, END = 258, 259
VOCABULARY = 260
MAX_LENGTH = 300

E = TypeVar("E")


@dataclass(frozen=True)
class Err(Exception, Generic[E]):
    value: E


@dataclass
class Error:
    code: str
    message: str


def refuse(code: str, message: str) -> Err[Error]:
    return Err(Error(code, message))


@dataclass
class World:
    """Everything that the fake modules share; a test starts with a fresh one."""

    now: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    ends: list[int] = field(default_factory=list)  # when each pass ends
    most_at_once: int = 0
    snapshots: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    inbox: list[tuple[int, str | None]] = field(default_factory=list)  # (arrives at, message)
    outbox: list[str] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    broken_off: list[int] = field(default_factory=list)
    refuse_next_pass: str | None = None
    names: Any = field(default_factory=itertools.count)

    def submit(self) -> int:
        """When a pass that starts now ends."""
        if self.refuse_next_pass is not None:
            code, self.refuse_next_pass = self.refuse_next_pass, None
            raise refuse(code, "the test refused this pass")
        end = self.now + PASS_NS
        self.ends.append(end)
        self.most_at_once = max(self.most_at_once, sum(other > self.now for other in self.ends))
        return end

    def until(self, time: int) -> None:
        self.now = max(self.now, time)


world = World()


def reset() -> World:
    world.__init__()  # type: ignore[misc]  # the modules hold on to the one object
    return world


class Resource:
    """A handle; dropping it twice is an error of the SDK."""

    def __init__(self) -> None:
        self._dropped = False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        assert not self._dropped, f"{type(self).__name__} dropped twice"
        self._dropped = True


class Pollable(Resource):
    def __init__(self, ready_at: int | None) -> None:
        super().__init__()
        self.ready_at = ready_at

    def ready(self) -> bool:
        assert not self._dropped
        return self.ready_at is not None and self.ready_at <= world.now


def wait(pollables: Sequence[Pollable], timeout_ns: int | None) -> list[int]:
    world.calls["wait"] += 1
    times = [pollable.ready_at for pollable in pollables if pollable.ready_at is not None]
    if timeout_ns is not None:
        times.append(world.now + timeout_ns)
    assert times, "a real host would trap or hang here"
    world.until(min(times))
    return [index for index, pollable in enumerate(pollables) if pollable.ready()]


def timer(duration_ns: int) -> Pollable:
    return Pollable(world.now + duration_ns)


def now_ns() -> int:
    return world.now


class Level(Enum):
    TRACE = 0
    DEBUG = 1
    INFO = 2
    WARN = 3
    ERROR = 4


def log(level: Level, message: str) -> None:
    world.log.append((level.name, message))


class Tokenizer(Resource):
    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        if any(not 0 <= token < VOCABULARY for token in tokens):
            raise refuse("invalid-request", "token ids out of range")
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def vocabulary(self) -> str:
        return json.dumps([[token, base64.b64encode(bytes([token])).decode()] for token in range(256)])

    def special_tokens(self) -> str:
        return json.dumps([[token, f"<{token}>"] for token in range(256, VOCABULARY)])

    def split_regex(self) -> str:
        return ""


class Model(Resource):
    @classmethod
    def load(cls, name: str) -> Model:
        if name != "fake":
            raise refuse("not-found", f"no model named {name!r}; this server has: fake")
        return cls()

    def name(self) -> str:
        return "fake"

    def describe(self) -> str:
        return json.dumps({"vocab_size": VOCABULARY, "max_model_len": MAX_LENGTH, "page_size": 16})

    def tokenizer(self) -> Tokenizer:
        return Tokenizer()


def turn(role: str, text: str) -> list[int]:
    if role == "cue":
        return [CUE]
    if role == "seal":
        return [END]
    return [ROLES[role], *text.encode(), END]


class Context(Resource):
    def __init__(self, history: Sequence[int] = (), waiting: Sequence[int] = ()) -> None:
        super().__init__()
        self.history = list(history)
        self.waiting = list(waiting)
        self.released = False

    def use(self, name: str) -> None:
        assert not self._dropped, f"{name} after the handle was dropped"
        world.calls[name] += 1
        if self.released:
            raise refuse("invalid-request", "released")

    @classmethod
    def create(cls, model: Model) -> Context:
        return cls()

    @classmethod
    def open(cls, model: Model, name: str) -> Context:
        if name not in world.snapshots:
            raise refuse("not-found", f"no snapshot named {name!r}")
        return cls(*world.snapshots[name])

    @classmethod
    def take(cls, model: Model, name: str) -> Context:
        context = cls.open(model, name)
        del world.snapshots[name]
        return context

    @classmethod
    def delete(cls, model: Model, name: str) -> None:
        cls.take(model, name)

    def fork(self) -> Context:
        self.use("fork")
        return Context(self.history, self.waiting)

    def save(self, name: str) -> None:
        self.use("save")
        world.snapshots[name] = (list(self.history), list(self.waiting))

    def snapshot(self) -> str:
        name = f"snapshot-{next(world.names)}"
        self.save(name)
        return name

    def release(self) -> None:
        self.released = True

    def add_text(self, role: str, text: str) -> None:
        self.use("add_text")
        self.waiting += turn(role, text)

    def equip(self, tools: str) -> None:
        self.use("equip")
        self.waiting += turn("user", tools)

    def add_tool_call(self, name: str, arguments: str, call_id: str) -> None:
        self.use("add_tool_call")
        self.waiting += turn("assistant", f"{name} {arguments} {call_id}")

    def add_tool_result(self, name: str, content: str, call_id: str) -> None:
        self.use("add_tool_result")
        self.waiting += turn("user", f"{name} {content} {call_id}")

    def cue(self) -> None:
        self.use("cue")
        if not self.waiting or self.waiting[-1] != CUE:
            self.waiting.append(CUE)

    def seal(self) -> None:
        self.use("seal")
        self.waiting.append(END)

    def append(self, tokens: Sequence[int]) -> None:
        self.use("append")
        self.waiting += tokens

    def buffer(self) -> list[int]:
        self.use("buffer")
        return list(self.waiting)

    def drain(self) -> list[int]:
        self.use("drain")
        held, self.waiting = self.waiting, []
        return held

    def take_back(self) -> None:
        if not self.history:
            raise refuse("invalid-request", "empty input: nothing to continue from")
        self.waiting.insert(0, self.history.pop())

    def flush(self) -> PendingFlush:
        self.use("flush")
        end = world.submit()
        self.history += self.drain()
        return PendingFlush(end)

    def length(self) -> int:
        self.use("length")
        return len(self.history)

    def position(self) -> int:
        return len(self.history)

    def page_size(self) -> int:
        return 16

    def tokens(self) -> list[int]:
        return list(self.history)

    def truncate(self, count: int) -> None:
        self.use("truncate")
        if count > len(self.history):
            raise refuse("invalid-request", f"cannot drop {count} of {len(self.history)} tokens")
        del self.history[len(self.history) - count :]
        self.waiting = []

    def evict(self, start: int, end: int) -> None:
        self.use("evict")
        world.calls[f"evict {start} {end}"] += 1

    def pin(self, start: int, end: int) -> None:
        self.use("pin")
        world.calls[f"pin {start} {end}"] += 1

    def priority(self, value: int) -> None:
        self.use("priority")


class PendingFlush(Resource):
    def __init__(self, end: int) -> None:
        super().__init__()
        self.end = end

    def pollable(self) -> Pollable:
        return Pollable(self.end)

    def cancel(self) -> bool:
        return False  # the scripted model is always done already

    def finish(self) -> None:
        world.until(self.end)


class RawPages(Resource):
    """Counts, and nothing behind them."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context, self.count, self.fixed = context, -(-len(context.history) // 16), 0

    @classmethod
    def take(cls, context: Context) -> RawPages:
        context.use("take pages")
        return cls(context)

    def committed(self) -> int:
        return self.fixed

    def working(self) -> int:
        return self.count - self.fixed

    def working_rows(self) -> int:
        return len(self.context.history) - 16 * self.fixed

    def reserve(self, count: int) -> None:
        self.count += count

    def commit(self, count: int) -> None:
        if 16 * (self.fixed + count) > len(self.context.history):
            raise refuse("invalid-request", "not full")
        self.fixed += count

    def release(self, count: int) -> None:
        assert not self._dropped
        if 16 * (self.count - count) < len(self.context.history):
            raise refuse("invalid-request", "not empty")
        self.count -= count


def logits(history: Sequence[int]) -> list[float]:
    """Letters and blanks are likely, the end of the turn now and then, everything else hardly."""
    source = random.Random(hashlib.sha256(struct.pack(f"<{len(history)}I", *history)).digest())
    values = [source.gauss(0.0, 1.0) for _ in range(VOCABULARY)]
    for token in (*range(97, 123), 32):
        values[token] += 6.0
    values[END] += 5.0
    return [struct.unpack("<f", struct.pack("<f", value))[0] for value in values]


def softmax(values: Sequence[float], temperature: float = 1.0) -> list[float]:
    top = max(values)
    weights = [math.exp((value - top) / (temperature or 1e-6)) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]


class Sampler(Resource):
    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"temperature": 0.0}
        self.bias: dict[int, float] = {}

    def temperature(self, value: float) -> None:
        if value < 0:
            raise refuse("invalid-request", f"temperature is {value}, expected 0 or more")
        self.settings["temperature"] = value

    def top_k(self, value: int) -> None:
        self.settings["top_k"] = value

    def top_p(self, value: float) -> None:
        self.settings["top_p"] = value

    def min_p(self, value: float) -> None:
        self.settings["min_p"] = value

    def penalties(self, repetition: float, presence: float, frequency: float) -> None:
        self.settings["penalties"] = (repetition, presence, frequency)

    def logit_bias(self, tokens: Sequence[int], values: Sequence[float]) -> None:
        self.bias = dict(zip(tokens, values, strict=True))

    def seed(self, value: int) -> None:
        self.settings["seed"] = value

    def draw(self, history: Sequence[int], allowed: Callable[[int], bool] = lambda token: True) -> int:
        values = logits(history)
        for token, value in self.bias.items():
            values[token] += value
        values = [value if allowed(token) else -1e9 for token, value in enumerate(values)]
        if self.settings["temperature"] == 0:
            return values.index(max(values))
        noise = random.Random(f"{self.settings.get('seed', 1)}/{len(history)}")
        return noise.choices(range(VOCABULARY), softmax(values, self.settings["temperature"]))[0]


class ForwardPass(Resource):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        self.inputs: list[int] = []
        self.samples: list[tuple[list[int], Sampler]] = []
        self.probes: list[tuple[int, Callable[[list[int]], tuple[list[int], list[float]]]]] = []
        self.allowed: Callable[[int], bool] = lambda token: True
        self.rows: list[list[int]] | None = None

    def timeout_ns(self, duration: int) -> None:
        world.calls[f"timeout of {duration} ns"] += 1

    def priority(self, value: int) -> None:
        world.calls[f"priority {value}"] += 1

    def input(self, tokens: Sequence[int]) -> None:
        self.inputs += tokens

    def input_at(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        self.inputs += tokens

    def input_drafts(self, tokens: Sequence[int]) -> None:
        raise refuse("unsupported", "the scripted model verifies no drafts")

    def attention_mask(self, rows: Sequence[Sequence[int]]) -> None:
        self.rows = [list(row) for row in rows]

    def mask_attention_layers_only(self) -> None:
        world.calls["attention layers only"] += 1

    def logit_mask(self, runs: Sequence[int]) -> None:
        flags = [bool(index % 2) for index, length in enumerate(runs) for _ in range(length)]
        self.allowed = lambda token: token < len(flags) and flags[token]

    def sample(self, rows: Sequence[int], sampler: Sampler) -> None:
        self.samples.append((list(rows), sampler))

    def probe_logits(self, row: int) -> None:
        self.probes.append((row, lambda history: ([], logits(history))))

    def probe_distribution(self, row: int, temperature: float, k: int) -> None:
        def best(history: list[int]) -> tuple[list[int], list[float]]:
            chances = softmax(logits(history), temperature)
            order = sorted(range(VOCABULARY), key=lambda token: -chances[token])[: k or VOCABULARY]
            return order, [chances[token] for token in order]

        self.probes.append((row, best))

    def probe_logprobs(self, row: int, tokens: Sequence[int]) -> None:
        self.probes.append(
            (row, lambda history: ([], [math.log(softmax(logits(history))[token]) for token in tokens]))
        )

    def probe_entropy(self, row: int) -> None:
        self.probes.append(
            (row, lambda history: ([], [-sum(p * math.log(p) for p in softmax(logits(history)) if p > 0)]))
        )

    def probe_hidden(self, row: int) -> None:
        self.probes.append((row, lambda history: ([], [float(len(history)), 0.5])))

    def pass_speculation(self, allowed: bool) -> None:
        world.calls["pass_speculation"] += 1

    def execute(self) -> PendingPass:
        self.context.use("execute")
        if not self.inputs:
            raise refuse("invalid-request", "empty input: a pass needs at least one token")
        end = world.submit()
        before = list(self.context.history)
        self.context.history += self.inputs
        seen = [before + self.inputs[: row + 1] for row in range(len(self.inputs))]
        drawn = [sampler.draw(seen[row], self.allowed) for rows, sampler in self.samples for row in rows]
        return PendingPass(end, drawn, [probe(seen[row]) for row, probe in self.probes])


class PendingPass(Resource):
    def __init__(self, end: int, drawn: list[int], probed: list[tuple[list[int], list[float]]]) -> None:
        super().__init__()
        self.end, self.drawn, self.probed = end, drawn, probed

    def cancel(self) -> bool:
        return False

    def pollable(self) -> Pollable:
        return Pollable(self.end)

    def tokens(self) -> list[int]:
        world.until(self.end)
        return self.drawn

    def probe(self, index: int) -> tuple[list[int], list[float]]:
        return self.probed[index]

    def probe_bytes(self, index: int) -> str:
        values = self.probed[index][1]
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def step(context: Context, token: int, sampler: Sampler) -> int:
    context.use("step")
    world.until(world.submit())
    context.history.append(token)
    return sampler.draw(context.history)


class Generation(Resource):
    """All tokens are known at once; one becomes visible each PASS_NS."""

    def __init__(self, context: Context, sampler: Sampler) -> None:
        super().__init__()
        self.context, self.sampler = context, sampler
        self.limit, self.stops = 0, set[int]()
        self.tokens: list[int] = []
        self.base: list[int] = []
        self.taken = 0
        self.reason = ""
        self.over = False
        self.is_whole = False

    def whole(self) -> None:
        self.is_whole = True

    def max_tokens(self, count: int) -> None:
        self.limit = count

    def stop_tokens(self, tokens: Sequence[int]) -> None:
        self.stops = set(tokens)

    def timeout_ns(self, duration: int) -> None:
        world.calls[f"timeout of {duration} ns"] += 1

    def priority(self, value: int) -> None:
        world.calls[f"priority {value}"] += 1

    def start(self) -> None:
        self.context.use("generate")
        if not self.context.waiting:
            self.context.take_back()
        self.started = world.now
        world.submit()
        self.base = self.context.history + self.context.drain()
        self.reason = "length"
        while len(self.tokens) < (self.limit or MAX_LENGTH - len(self.base)):
            token = self.sampler.draw(self.base + self.tokens)
            if token in self.stops:
                self.reason = "stop"
                break
            self.tokens.append(token)

    def _visible(self) -> int:
        return min(len(self.tokens), (world.now - self.started) // PASS_NS)

    def _next_at(self) -> int:
        if self.taken < len(self.tokens) and not self.is_whole:
            return self.started + (self.taken + 1) * PASS_NS
        return self.started + len(self.tokens) * PASS_NS

    def pollable(self) -> Pollable:
        return Pollable(self._next_at())

    def next(self) -> list[int] | None:
        world.calls["next"] += 1
        world.until(self._next_at())
        new = self.tokens[self.taken : self._visible()]
        self.taken += len(new)
        if new:
            return new
        self._end(self.taken)
        return None

    def _end(self, keep: int) -> None:
        if not self.over:
            self.over = True
            kept = self.tokens[:keep]
            self.context.history = self.base + kept[:-1]
            self.context.waiting = kept[-1:]

    def finish_reason(self) -> str:
        return self.reason

    def break_off(self, consumed: int) -> None:
        assert consumed <= self.taken
        world.broken_off.append(consumed)
        self._end(consumed)

    def halt(self) -> list[int]:
        rest = self.tokens[self.taken : self._visible()]
        self.taken += len(rest)
        world.broken_off.append(self.taken)
        self._end(self.taken)
        return rest


class Decoder(Resource):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.reset()

    @classmethod
    def create(cls, model: Model, kind: str) -> Decoder:
        return cls(kind)

    def reset(self) -> None:
        self.text = ""
        self.thinking = self.calling = False

    def finish(self) -> list[Event]:
        """A block or a call that is open ends as it is."""
        if self.kind == "chat":
            events = [Event("done", self.text, 0)]
        elif self.kind == "reasoning":
            events = [Event("complete", self.text, 0)] if self.thinking else []
        else:
            events = [Event("invalid", "(oh", 0)] if self.calling else []
        self.reset()
        return events

    def feed(self, tokens: Sequence[int]) -> list[Event]:
        return [event for token in tokens for event in self._meaning(token)]

    def _meaning(self, token: int) -> list[Event]:
        if self.kind == "reasoning":
            return self._thought(token)
        if self.kind == "tools":
            return self._called(token)
        if token == END:
            return [Event("done", self.text, 0)]
        if token > 255:
            return [Event("interrupt", "", token)]
        self.text += chr(token)
        return [Event("delta", chr(token), 0)]

    def _called(self, token: int) -> list[Event]:
        """A call begins with (, and ends well with ) or badly at the turn's end."""
        known = {
            "(": Event("start", "", 0),
            ")": Event("call", '{"name": "f", "arguments": {"city": "東京"}}', 0),
            chr(END): Event("invalid", "(oh", 0),
        }
        self.calling = chr(token) == "(" or (self.calling and chr(token) not in known)
        return [known[chr(token)]] if chr(token) in known else []

    def _thought(self, token: int) -> list[Event]:
        """A block stands between < and >."""
        if chr(token) == "<":
            self.thinking, self.text = True, ""
            return [Event("start", "", 0)]
        if chr(token) == ">" and self.thinking:
            self.thinking = False
            return [Event("complete", self.text, 0)]
        if not self.thinking:
            return []
        self.text += chr(token)
        return [Event("delta", chr(token), 0)]


@dataclass
class Event:
    kind: str
    text: str
    token: int


class PendingMessage(Resource):
    def pollable(self) -> Pollable:
        return Pollable(world.inbox[0][0] if world.inbox else None)

    def take(self) -> str | None:
        arrives, message = world.inbox.pop(0)
        world.until(arrives)
        return message


class Child(Resource):
    """A program that answers its prompt in capitals, a pass later."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.answer: str | None = json.dumps(given["prompt"].upper())
        self.end = world.submit()

    def pid(self) -> str:
        return "child"

    def pollable(self) -> Pollable:
        return Pollable(self.end)

    def get(self) -> str | None:
        assert not self._dropped
        world.until(self.end)
        if self.answer is None:
            raise refuse("cancelled", "its parent ended it")
        return self.answer

    def cancel(self) -> None:
        if world.now < self.end:
            self.answer = None


def launch(program: str, given: str) -> Child:
    if program != "launch-callee":
        raise refuse("not-found", f"no program {program!r}")
    return Child(json.loads(given))


CONTENTS: dict[str, dict[str, Any]] = {
    "types": {"Error": Error},
    "poll": {"Pollable": Pollable, "wait": wait, "timer": timer, "now_ns": now_ns},
    "runtime": {
        "version": lambda: "1.2.3",
        "instance_id": lambda: "instance",
        "username": lambda: "somebody",
        "models": lambda: ["fake"],
        "priority": lambda: 0,
    },
    "logging": {"Level": Level, "log": log},
    "model": {"Model": Model, "Tokenizer": Tokenizer},
    "context": {"Context": Context, "PendingFlush": PendingFlush},
    "forward": {"Sampler": Sampler, "ForwardPass": ForwardPass, "PendingPass": PendingPass, "step": step},
    "generate": {"Generation": Generation},
    "chat": {
        "Event": Event,
        "Decoder": Decoder,
        "stop_tokens": lambda model: [END],
        "turn_tokens": lambda model, role, text: turn(role, text),
        "tool_tokens": lambda model, tools: turn("user", tools),
        "result_tokens": lambda model, name, content: turn("user", f"{name} {content}"),
    },
    "session": {
        "PendingMessage": PendingMessage,
        "send": lambda message: world.outbox.append(message),
        "send_file": lambda content: world.outbox.append(content),
        "receive": PendingMessage,
        "receive_file": PendingMessage,
    },
    "pages": {"RawPages": RawPages},
    "children": {"Child": Child, "launch": launch},
}


class WitWorld:
    """What the guest's application class is derived from."""


def install() -> None:
    """Puts the modules where the SDK imports them from."""
    types = _module("componentize_py_types", {"Err": Err})
    package = _module("wit_world", {"WitWorld": WitWorld, "__path__": []})
    imports = _module("wit_world.imports", {"__path__": []})
    modules = [types, package, imports]
    for name, contents in CONTENTS.items():
        module = _module(f"wit_world.imports.{name}", contents)
        setattr(imports, name, module)
        modules.append(module)
    sys.modules.update({module.__name__: module for module in modules})


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module
