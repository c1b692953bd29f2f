"""Files what a GPU session brought back under benchmarks/results/<device>/, one file for each operator and one for the engine.

PYTHONPATH=. python benchmarks/file_results.py session/operators.json session/engine.json
"""

import json
import sys
from pathlib import Path

from penstock.bench.record import slug, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def file_results(path: Path, results: Path = RESULTS) -> list[Path]:
    """Writes the documents of one session file; those without numbers are left out."""
    session = json.loads(path.read_text())
    documents = session.get("operators", {path.stem: session})
    written = []
    for name, document in documents.items():
        if document.get("results") or document.get("rows"):
            written.append(write_json(results / slug(document["environment"]["device"]) / f"{name}.json", document))
    return written


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for place in file_results(Path(argument)):
            print(place)
