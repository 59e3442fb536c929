"""Adapters: the mapper, the LoRA, and the file that holds both."""
