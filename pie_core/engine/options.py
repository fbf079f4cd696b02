"""What can be set about an engine: limits of a step, of snapshots, of waiting for memory."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineOptions:
    max_batch_tokens: int = field(
        default=2048,
        metadata={"help": "Most tokens of one step; longer prompts are split. The driver may allow fewer."},
    )
    max_batch_requests: int = field(
        default=256, metadata={"help": "Most contexts of one step. The driver may allow fewer."}
    )
    max_in_flight: int = field(
        default=2,
        metadata={
            "help": "Steps queued at the driver at a time; generations keep it so busy. The driver may allow fewer."
        },
    )
    speculation_depth: int = field(
        default=1,
        metadata={
            "help": "Passes to run before a program asks for them, fed with the token that is being drawn; 0 is none."
        },
    )
    prefix_cache: bool = field(
        default=True,
        metadata={
            "help": "Whether rows that a tenant's context has computed are shared with its other contexts."
        },
    )
    request_timeout_s: float | None = field(
        default=None,
        metadata={"help": "How long a pass or generation may take, waiting included; null is no limit."},
    )
    max_contexts_per_process: int | None = field(
        default=None, metadata={"help": "Contexts that a program may have at a time; null is no limit."}
    )
    max_contexts_per_tenant: int | None = field(
        default=None, metadata={"help": "Contexts that the programs of a tenant may have together."}
    )
    max_requests_per_process: int | None = field(
        default=None, metadata={"help": "Passes and generations that a program may have open at a time."}
    )
    max_requests_per_tenant: int | None = field(
        default=None, metadata={"help": "... and the programs of a tenant together."}
    )
    max_tokens_per_process: int | None = field(
        default=None, metadata={"help": "Tokens that a program may feed and draw in its life."}
    )
    max_tokens_per_minute_per_tenant: int | None = field(
        default=None, metadata={"help": "Tokens that a tenant's programs may feed and draw in a minute."}
    )
    max_page_share_per_process: float = field(
        default=1.0,
        metadata={"help": "Part of the pages of a cache group that a program's contexts may fill."},
    )
    max_page_share_per_tenant: float = field(
        default=1.0, metadata={"help": "... and those of a tenant's programs together."}
    )
    snapshot_folder: str | None = field(
        default=None, metadata={"help": "Where snapshots are kept over restarts; null keeps them in memory."}
    )
    shares_snapshot_folder: bool = field(
        default=False, metadata={"help": "Whether other engines save and delete in that folder as well."}
    )
    snapshot_ttl_s: float | None = field(
        default=None, metadata={"help": "How long a snapshot is kept after it was saved; null is for ever."}
    )
    max_snapshots: int = field(default=256, metadata={"help": "Named snapshots of one tenant."})
    max_snapshot_share: float = field(
        default=0.5, metadata={"help": "Part of the pages of a cache group that snapshots may hold."}
    )
    max_attachment_bytes: int = field(
        default=1 << 24, metadata={"help": "Largest attachment of a snapshot, in bytes."}
    )
    swap_bytes: int | None = field(
        default=None,
        metadata={"help": "Host memory for contexts that are swapped out; null is all that the driver has."},
    )
    swap_gb_per_s: float = field(
        default=8.0, metadata={"help": "How fast the driver copies pages to host memory and back."}
    )
    max_pass_outputs: int = field(default=4096, metadata={"help": "Most samples and probes of one pass."})
    max_pass_values: int = field(
        default=1 << 24, metadata={"help": "Most numbers that the probes of one pass may return."}
    )
    checkpoint_tokens: int = field(
        default=256,
        metadata={"help": "Recurrent models: a state is kept each time so many tokens are computed."},
    )
    max_checkpoints: int = field(
        default=4, metadata={"help": "Recurrent models: states that a context keeps for going back."}
    )
