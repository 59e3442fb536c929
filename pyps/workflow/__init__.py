"""Workflow files: fork-joins described in YAML, one after the other."""
