"""One folder per driver: what runs a forward pass. All have the same file names, so two read side by side."""
