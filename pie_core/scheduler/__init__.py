"""From waiting passes to batches for the driver, and from its results back to those who asked."""
