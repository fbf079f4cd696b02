"""The parts of the driver contract suite, by subject; `pie_core.testing.any_driver` puts them together."""
