"""Examples to train and measure on: what they are, how to build them, how they look in tokens."""
