"""KV memory above the driver line: which pages are free, which a context holds. Ids and counts, never tensors."""
