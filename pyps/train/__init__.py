"""Training of adapters, in PyTorch (pyps-llama[train]). Nothing else in pyps imports it but `pyps train`."""
