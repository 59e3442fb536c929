"""The adapter file's own keys and values, named in one place for those who write it and those who read it."""

from typing import Literal

LayoutName = Literal["shared", "paper"]
LAYOUTS: tuple[LayoutName, ...] = ("shared", "paper")
