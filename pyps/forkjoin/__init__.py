"""Fork-join: branches in parallel, their caches joined, one answer."""

from pyps.forkjoin.forkjoin import Branch, ForkJoin

__all__ = ["Branch", "ForkJoin"]
