"""Adapters between PEFT (Transformers' names, one matrix per module) and GGUF (llama.cpp's names, one file)."""
