"""What the job scripts read is documented."""

from __future__ import annotations

import re
from pathlib import Path

#: Handed from script to script, not set by people.
INTERNAL = {"COCONUT_NODE_LOG", "COCONUT_RANK_LOGS"}


def test_every_setting_is_documented(project: Path) -> None:
    scripts = [path for path in (project / "slurm").glob("*.sh") if not path.name.startswith("site")]
    assert len(scripts) >= 3
    read = set(re.findall(r"\bCOCONUT_[A-Z_]+\b", "".join(path.read_text() for path in scripts))) - INTERNAL
    table = set(re.findall(r"^\| `(COCONUT_[A-Z_]+)`", (project / "docs" / "slurm.md").read_text(), re.MULTILINE))
    example = set(re.findall(r"\bCOCONUT_[A-Z_]+\b", (project / "slurm" / "site.example.sh").read_text()))
    assert read == table == example
