"""The original's side of `benchmark.py --reference`: runs its code, in its own Python, on request.

    PYTHON scripts/benchmark_reference.py DIR

DIR is a clone of the original, PYTHON has the packages that it needs. Requests come as lines of
JSON on stdin and are answered one by one on stdout; arrays are in our layouts and travel in `.npz`
files. Weights follow from their names, as in the parity cases, but for the temporal blends, which
are all the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), sys.argv[1]]
# What libraries print must not be taken for answers.
answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr

import torch  # noqa: E402

from scripts.benchmarks.reference import Original  # noqa: E402


def main() -> None:
    """Say hello, then answer requests until there are no more."""
    print(json.dumps({"torch": torch.__version__}), file=answers, flush=True)
    original = None
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                original = Original(**request)
                answer = {"device": str(original.device)}
            elif original is None:
                raise ValueError("nothing is loaded")
            elif do == "outputs":
                file = request.pop("file")
                out, _ = original.run(**request)
                np.savez(file, *(array.float().cpu().numpy() for array in out))
                answer = {}
            elif do == "time":
                answer = {"seconds": original.run(**request)[1]}
            else:
                answer = {"bytes": original.peak_memory()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
