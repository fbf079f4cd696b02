"""The options of the driver copycat, as they stand under `driver: options:` in a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Options:
    page_size: int = field(default=16, metadata={"help": "tokens on a page"})
    num_pages: int = field(default=4096, metadata={"help": "pages of the cache"})
    max_model_len: int = field(default=8192, metadata={"help": "highest position + 1"})
