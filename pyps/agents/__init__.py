"""Branches and synthesizers that take several turns and call tools."""
