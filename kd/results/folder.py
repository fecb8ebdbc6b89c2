"""Records of the finished runs in a folder."""

import json
from pathlib import Path
from typing import Any


def load_results(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all finished runs in a folder, oldest first."""
    records = []
    if folder.exists():
        next(folder.iterdir(), None)  # raises OSError for an unreadable folder, for which `glob` yields nothing
    for path in folder.glob("*/result.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and "students" in record:  # otherwise a file of another program
            records.append({**record, "run": path.parent.name})
    return sorted(records, key=lambda record: record.get("finished", ""))
