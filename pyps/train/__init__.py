"""Training of adapters, in PyTorch. Needs `pip install pyps[train]`; nothing else in pyps imports it."""
