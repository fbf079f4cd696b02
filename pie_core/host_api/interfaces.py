"""Every interface that this host offers to guests, as the linker takes them."""

from __future__ import annotations

from pie_core.host_api import (
    chat,
    children,
    context,
    forward,
    generate,
    logging,
    model,
    pages,
    poll,
    runtime,
    session,
)

INTERFACES = tuple(
    module.interface
    for module in (poll, runtime, logging, model, context, pages, forward, generate, chat, session, children)
)
