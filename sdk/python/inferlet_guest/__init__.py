"""The generic Python guest: a component that takes an inferlet as source text and runs its `main`."""
