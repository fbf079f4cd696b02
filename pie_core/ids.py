"""Small types for the integers and strings that must not be swapped for one another."""

from __future__ import annotations

from typing import NewType

TokenId = NewType("TokenId", int)
PageId = NewType("PageId", int)  # a physical page of one cache group
SlotId = NewType("SlotId", int)  # a physical slot of a state group, or of the host swap space
ContextId = NewType("ContextId", int)  # unique in an engine; chosen by the side that asks
RequestId = NewType("RequestId", int)  # unique on an EnginePort; pairs a command with its reply
ProcessId = NewType("ProcessId", str)  # one running inferlet
Ticket = NewType("Ticket", int)  # one batch inside a driver; grows by submission
ModelName = NewType("ModelName", str)
Tenant = NewType("Tenant", str)
