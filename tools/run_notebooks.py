"""Execute every notebook in a folder and fail on the first error; nothing is written.

    python tools/run_notebooks.py tutorials

Prints each notebook's cells and seconds. Tutorials 3 and 4, which measure, dominate.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> None:
    notebooks = sorted(Path(sys.argv[1]).glob("*.ipynb"))
    if not notebooks:
        raise SystemExit(f"no notebooks in {sys.argv[1]}")
    for path in notebooks:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": path.parent}}
        NotebookClient(notebook, timeout=600, resources=where).execute()
        print(f"{path}: {len(notebook.cells)} cells in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
