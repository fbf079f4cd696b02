"""Contract suites that every plugin passes, ours and a third party's, and what they are written with."""
