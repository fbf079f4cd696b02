"""Running WebAssembly guests: programs, fibers, the pump that drives them, and their limits."""
