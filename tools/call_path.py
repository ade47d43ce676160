"""How much of the package a reader of one call has to open.

    python tools/call_path.py [attribute|graph] [--files]

Prints, for ``attribute`` and ``attribution_graph``, plainly and in tiles, how many of the package's
files and functions the second such call on the demo model enters (the first also audits the
model); with --files, which files. About 20 s, most of it loading torch and the model.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import tl_contrastive_lrp as clrp

PACKAGE = Path(clrp.__file__).parent
CALLS = {"attribute": clrp.attribute, "attribution_graph": clrp.attribution_graph}


def entered(call: Callable[[], object]) -> set[CodeType]:
    """Code of the package's functions that ``call`` enters in this thread."""
    codes: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    own = {code for code in codes if Path(code.co_filename).is_relative_to(PACKAGE)}
    return {code for code in own if not code.co_name.startswith("<")}


def main() -> None:
    """Print a line for each way."""
    which = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    model = clrp.load_demo_model()
    case = clrp.load_demo_cases("code")[0]
    objective = clrp.logit_diff(model, case.target, case.contrast)
    for name, function in CALLS.items():
        if which not in name:
            continue
        for how in ({"memory": "plain"}, {"memory": "tiled", "tile": 16, "progress": False}):

            def call(function: Any = function, how: Any = how) -> None:
                function(model, case.prompt, objective, **how)

            call()
            codes = entered(call)
            files = Counter(str(Path(code.co_filename).relative_to(PACKAGE)) for code in codes)
            print(f"{name}, {how['memory']}: {len(files)} files, {len(codes)} functions")
            if "--files" in sys.argv:
                for file, count in sorted(files.items()):
                    print(f"    {file}: {count}")


if __name__ == "__main__":
    main()
