"""What a guest may ask: one module for each interface in `pie_core/wit`, of the same name."""
