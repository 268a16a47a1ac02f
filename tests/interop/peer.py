"""auto-round's own checkpoint of a model, rounded to nearest; run in an environment with it.

python tests/interop/peer.py MODEL OUT SCHEME FORMAT OPTIONS

OPTIONS is JSON. Prints the directory that holds the checkpoint on the last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Quantize and write."""
    from auto_round import AutoRound

    model, out, scheme, form, options = sys.argv[1:6]
    text = ["The quick brown fox jumps over the lazy dog. " * 8] * 4
    job = AutoRound(
        model,
        scheme=scheme,
        iters=0,
        disable_opt_rtn=True,
        disable_model_free=True,  # packs as its other ways do not
        nsamples=2,
        seqlen=32,
        dataset=text,
        **json.loads(options),
    )
    job.quantize_and_save(out, format=form)
    print(next(Path(out).rglob("config.json")).parent)


if __name__ == "__main__":
    main()
