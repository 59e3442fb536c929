"""Training of adapters, in PyTorch (pyps[train]). Nothing else in pyps imports it but `pyps train`."""
