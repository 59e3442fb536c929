"""Examples to train and to measure on: their format, how to build them, and how they look in tokens."""
