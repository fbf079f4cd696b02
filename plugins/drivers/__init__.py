"""One folder per driver: what runs a forward pass. Each has the same file names, so two can be read side by side."""
