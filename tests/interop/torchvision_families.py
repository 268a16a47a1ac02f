"""Every family of small models that see, on its whole way with images, where torchvision is.

    python tests/interop/torchvision_families.py                # those of which there is no record
    python tests/interop/torchvision_families.py llama4 molmo2  # these, again
    python tests/interop/torchvision_families.py --write        # docs/images.md, from the records

Image processors of some families exist for torchvision only, and eyes of others are models of timm,
which needs torchvision, too. Run it in an environment with both, and scipy, beside what
requirements-dev.txt lists. Records go to `out/images.jsonl`, one line each.

A torchvision that was built for CUDA loads beside a torch for the CPU, too: see `load_torchvision`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
import tomllib
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "images.md"
EXPECTED = ROOT / "tests" / "sweep" / "expected.toml"
INTRO = """# Families with images

Written by `python tests/interop/torchvision_families.py --write`, not by hand. Here: torch {torch},
transformers {transformers}, torchvision {torchvision}, timm {timm}.

A small random model of each family, a tokenizer and a processor made on the spot, drawn pictures:
calibration with images through the processor, two tuning steps of SignRound (W4A16, groups of 32),
no block worse than rounding to nearest, the checkpoint, its processor and its weights read back,
logits of a picture compared. *changed*: how far the tuned model's logits are from the source's,
relative to the largest; *read back*: how far those of the checkpoint are from the tuned model's.
*needs*: what its image processor cannot do without; the others run without torchvision.

| family | processor | needs | blocks | layers | changed | read back |
|---|---|---|---|---|---|---|
"""
SWEPT = """
Types that the sweep ([models.md](models.md)) cannot build without a package, through the sweep's
steps where it is there:

| type | needs | layers | images | read back |
|---|---|---|---|---|
"""
LEFT = """
Not tried: models whose code is in their repository and not in Transformers (Phi-3-vision, Molmo,
Kimi-VL, DeepSeek-VL's first release, InternVL and MiniCPM-V in their own layout); there was no
network to fetch it. Such code runs with `trust_remote_code` only, which is off by default: without
it the model is refused with what to do, with it configuration, model, tokenizer and processor may
run code alike (`tests/test_vlm_remote.py`: a model whose code lies beside its weights). Where the
rules do not find a model's eyes, a plugin's `ar_find_adapter` says what they are. What Transformers
has of these families by itself is above (phi4_multimodal, molmo2, kimi_k25, deepseek_vl, internvl).
"""
_FAKE = re.compile(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"')


def main() -> int:
    """Check families, write records; return 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help="write the page, check nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "images.jsonl")
    asked = parser.parse_args()
    kept = load_torchvision()
    _quiet()
    known = read(asked.out)
    if asked.write:
        PAGE.write_text(page(known), encoding="utf-8")
        return 0
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    done = set() if asked.families else {n for n, r in known.items() if not r["error"]}
    for name in asked.families or every():
        if name not in done:
            record = check(name)
            known[name] = record
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(name, record["error"] or "ok", record["seconds"], "s", flush=True)
    del kept
    failed = [name for name, record in known.items() if record["error"]]
    print(f"{len(known) - len(failed)} of {len(known)} pass")
    return 1 if failed else 0


def load_torchvision() -> Any:
    """Import torchvision; return what has to stay alive for it.

    Where a CUDA build of it lies beside a CPU build of torch, its compiled operators (nms,
    roi_align) do not load, and the import fails where it describes their shapes. Its transforms,
    which are all that image processors use, are plain torch: with the names of the operators
    defined, and nothing behind them, they work.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
    import torch

    found = importlib.util.find_spec("torchvision")
    assert found is not None
    assert found.origin is not None
    text = (Path(found.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "DEF")  # noqa: TOR901 - returned
    for name in sorted(set(_FAKE.findall(text))):
        library.define(f"{name}(Tensor a) -> Tensor")
    importlib.import_module("torchvision")
    return library


def every() -> list[str]:
    """Return the names of all families, and the types that need a package."""
    from ar_vlm.testing import FAMILIES

    return [*FAMILIES, *swept()]


def swept() -> dict[str, str]:
    """Return the types that the sweep expects to fail without a package, with its name."""
    known = tomllib.loads(EXPECTED.read_text(encoding="utf-8"))
    return {kind: entry["unless"] for kind, entry in known.items() if "unless" in entry}


def check(name: str) -> dict[str, Any]:
    """Return the record of a family, or of a type of the sweep."""
    from ar_tuner.testing import check_family
    from ar_vlm.testing import FAMILIES, check_images

    began, facts, error = time.perf_counter(), {}, ""
    if name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                facts = dataclasses.asdict(check_images(name, folder))
            except Exception as found:  # noqa: BLE001 - whatever a model raises is the finding
                error = f"{type(found).__name__}: {' '.join(str(found).split())}"[:400]
    else:
        record = check_family(name)
        facts = record.facts
        error = f"{record.failed}: {record.error}" if record.failed else ""
    seconds = round(time.perf_counter() - began, 1)
    return {"name": name, "error": error, "facts": facts, "seconds": seconds}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each name in a file."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def page(records: dict[str, dict[str, Any]]) -> str:
    """Return docs/images.md.

    Raises:
        KeyError: a family of which there is no record.
    """
    from importlib.metadata import version

    from ar_vlm.testing import FAMILIES

    names = ("torch", "transformers", "torchvision", "timm")
    parts = [INTRO.format(**{name: version(name) for name in names})]
    for name, family in sorted(FAMILIES.items()):
        needs = "torchvision" if family.torchvision else ""
        parts.append(_line(name, records[name], needs))
    parts.append(SWEPT)
    for name, package in swept().items():
        facts, error = records[name]["facts"], records[name]["error"]
        needs = "timm, torchvision" if package == "timm" else package
        images, worst = ("yes" if facts.get("images") else ""), facts.get("formats", {})
        back = error or f"{max(worst.values()):.0e}"
        parts.append(f"| {name} | {needs} | {facts.get('quantized', '')} | {images} | {back} |\n")
    return "".join([*parts, LEFT])


def _line(name: str, record: dict[str, Any], needs: str) -> str:
    facts = record["facts"]
    if record["error"]:
        return f"| {name} | | {needs} | | | | fails: {record['error'].replace('|', '/')} |\n"
    counts = f"{facts['blocks']} | {facts['layers']}"
    differences = f"{facts['changed']:.2f} | {facts['worst']:.0e}"
    return f"| {name} | {facts['processor']} | {needs} | {counts} | {differences} |\n"


def _quiet() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
