"""Fork-join: branches in parallel, their caches joined, one answer."""

from pyps.forkjoin.forkjoin import ForkJoin
from pyps.forkjoin.request import Branch, Options, Request

__all__ = ["Branch", "ForkJoin", "Options", "Request"]
