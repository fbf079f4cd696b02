"""What one guest may use."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """CPU time is counted between two suspensions: a guest that waits for the model is not using any.

    The stack is compiled into the code, for all programs alike: `EngineOptions.wasm_stack_bytes`.
    """

    memory_bytes: int = 512 * MIB
    cpu_seconds_per_resume: float = 10.0
    wall_seconds: float | None = None
    output_bytes: int = 16 * MIB  # stdout and stderr together
    max_handles: int = 100_000
    calls_per_second: float | None = None  # of the host, see `call_rate`
    tenant_calls_per_second: float | None = None  # ... by all guests of a tenant here

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "cpu_seconds_per_resume", "output_bytes", "max_handles"):
            if getattr(self, name) <= 0:
                raise ValueError(f"limits.{name} is {getattr(self, name)}: expected a number above 0")
        for name in ("wall_seconds", "calls_per_second", "tenant_calls_per_second"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"limits.{name} is {value}: expected a number above 0, or none")
