"""Training of adapters, in PyTorch (pip install 'pyps-llama[train]'); nothing else in pyps imports it."""
