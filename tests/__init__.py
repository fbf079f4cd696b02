"""The tests, in folders that mirror the tree. A package, so that a stray top-level `tests` elsewhere cannot hide it."""
