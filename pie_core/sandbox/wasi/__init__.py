"""WASI 0.2 of our own: everything that can wait goes through the same pollables as the host API.

Built-in WASI cannot be mixed in: a call that waits inside it stops every guest of the process.
"""
