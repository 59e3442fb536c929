"""Ends text files with exactly one line break, and lines without blanks; exits with 1 if one was changed.

python tools/end_of_file.py FILE…
"""

import re
import sys
from pathlib import Path


def main() -> int:
    """Mend the files that the command line names; return the exit code."""
    changed = []
    for path in map(Path, sys.argv[1:]):
        data = path.read_bytes()
        if (mended := re.sub(rb"[ \t]+$", b"", data, flags=re.MULTILINE).rstrip() + b"\n") != data and data:
            path.write_bytes(mended)
            changed.append(path)
    for path in changed:
        print(f"mended {path}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
