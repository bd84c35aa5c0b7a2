"""Write the documents that are made from the code: docs/configuration.md, of every configuration key.

python launch/docs.py            write
python launch/docs.py --check    write nothing; exit code 1 where a document is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the script runs from a clone that is not installed

from coconut.config.reference import markdown

DOCUMENT = ROOT / "docs" / "configuration.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args(argv)
    wanted = markdown()
    if DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == wanted:
        print(f"{DOCUMENT.relative_to(ROOT)} is up to date")
        return 0
    if arguments.check:
        print(f"{DOCUMENT.relative_to(ROOT)} is out of date: run python launch/docs.py", file=sys.stderr)
        return 1
    DOCUMENT.write_text(wanted, encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
