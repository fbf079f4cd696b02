"""The options of the dummy driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pie_core.contracts.driver import Feature
from pie_core.errors import LoadError

GroupKind = Literal["paged", "window", "latent", "state"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class DummyOptions:
    """What the pretended model looks like and how long its steps take."""

    seed: int = _option(0, "the weights: another seed is another model")
    vocab_size: int = _option(0, "token ids; 0 = that of the checkpoint's config.json")
    hidden_size: int = _option(16, "length of the hidden state that a probe gives")
    groups: tuple[GroupKind, ...] = _option(
        ("paged",), "the cache groups, one layer pair each, in this order"
    )
    window: int = _option(64, "KV rows that a group of kind window reads back")
    page_size: int = _option(16, "tokens on a page")
    num_pages: int = _option(8192, "pages of every group; slots, for kind state")
    num_host_pages: int = _option(1024, "pages of host swap space of every group; 0 = no swap")
    max_model_len: int = _option(32768, "highest position + 1")
    max_batch_tokens: int = _option(8192, "token rows of one step")
    max_batch_requests: int = _option(1024, "requests of one step")
    max_in_flight: int = _option(2, "steps that may be submitted and not collected")
    polled: bool = _option(
        False, "is asked whether a step is over, as a device is, instead of being waited for"
    )
    position_axes: Literal[1, 3] = _option(1, "3 for positions of frame, height and width")
    streams: int = _option(1, "columns of every token")
    level: Literal["step", "request"] = _option("step", "request: only whole generations, as some engines do")
    without: tuple[str, ...] = _option((), "features that it shall not declare, to see them refused")
    step_ms: float = _option(0.0, "how long the pretended device works on a step")
    token_us: float = _option(0.0, "... and on each token row of it")
    interpret: bool = _option(
        True, "false: tokens depend on context and place alone, at next to no cost, to measure what is around"
    )
    proposal_accuracy: float = _option(0.75, "fraction of proposed drafts that are right")
    fail_every: int = _option(0, "every n-th step fails as a whole; 0 = none")
    fail_token: int = _option(-1, "a request that reads this token id fails; -1 = none")


def check_options(options: DummyOptions) -> DummyOptions:
    """Raises LoadError that names the option, its value and what is allowed."""
    for name in _AT_LEAST_ONE:
        _demand(getattr(options, name) >= 1, options, name, "at least 1")
    for name in _AT_LEAST_ZERO:
        _demand(getattr(options, name) >= 0, options, name, "at least 0")
    _demand(options.vocab_size != 1, options, "vocab_size", "0, or at least 2")
    _demand(len(options.groups) > 0, options, "groups", "at least one of paged, window, latent and state")
    hollow = options.level == "step" and options.streams == 1
    _demand(options.interpret or hollow, options, "interpret", "true, but for level: step and streams: 1")
    _demand(options.proposal_accuracy <= 1, options, "proposal_accuracy", "at most 1")
    known = ", ".join(Feature)
    _demand(set(options.without) <= set(Feature), options, "without", f"a list of some of {known}")
    return options


_AT_LEAST_ONE = (
    *("hidden_size", "window", "page_size", "num_pages", "max_model_len"),
    *("max_batch_tokens", "max_batch_requests", "max_in_flight", "streams"),
)
_AT_LEAST_ZERO = ("vocab_size", "num_host_pages", "step_ms", "token_us", "proposal_accuracy", "fail_every")


def _demand(holds: bool, options: DummyOptions, name: str, expected: str) -> None:
    if not holds:
        raise LoadError(f"driver dummy: option {name} is {getattr(options, name)!r}; expected {expected}")
