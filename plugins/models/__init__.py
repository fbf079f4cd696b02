"""One file per model architecture, over the shared parts in `layers/`."""
