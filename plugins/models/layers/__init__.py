"""The parts that all architectures are made of, public for third-party architectures too.

`config`, `dense` and `architecture` load without torch, so that declaring an architecture costs nothing.
"""
