"""Text on its way to the model and back: tokenizers, chat templates, turns, and decoders of what a model writes."""

from __future__ import annotations
