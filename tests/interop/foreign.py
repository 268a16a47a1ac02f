"""Checkpoints that others made, opened by us: logits of both, on the same machine.

    python tests/interop/foreign.py --work DIR [--model DIR] [--auto-round PYTHON]
        [--gptqmodel PYTHON] [--compressed-tensors PYTHON] [--only WORDS]

PYTHON is the interpreter of an environment with that project. Every checkpoint is made by it, run
by it and run by us (backend dense, the checkpoint's own type). Outcomes go to DIR/foreign.json;
`page.py` makes a section of docs/interop.md of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ar_cli

HERE = Path(__file__).parent
DEMO = Path(ar_cli.__file__).parent / "demo" / "model"
LIMIT = 1800
"""Seconds a foreign process may take."""
SAME = 2e-2
"""||ours - theirs|| / ||theirs||: some roundings of a 16 bit type in four blocks."""


@dataclass(frozen=True)
class Foreign:
    """A checkpoint to make: by which project, with what options."""

    name: str
    by: str
    options: dict[str, Any] = field(default_factory=dict)
    scheme: str = ""
    form: str = ""


def _group(
    bits: int, *, where: str = "Linear", size: int | None = None, sym: bool = True, **more: Any
) -> dict[str, Any]:
    """Return a config group of compressed-tensors for integer weights."""
    weights = {"num_bits": bits, "type": "int", "symmetric": sym}
    weights |= {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    return {"targets": [where], "weights": weights} | more


def _named(groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {f"group_{i}": group for i, group in enumerate(groups)}


_TENSOR8 = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
_TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
_FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
_FP8 = {
    "targets": ["Linear"],
    "weights": _FLOAT8,
    "input_activations": _FLOAT8 | {"dynamic": False},
}
_GPTQ = {"bits": 4, "group_size": 32}
CASES = (
    Foreign("GPTQ 4 bit", "gptqmodel", _GPTQ),
    Foreign("GPTQ 4 bit, desc_act", "gptqmodel", _GPTQ | {"desc_act": True}),
    Foreign("GPTQ v2 asym", "gptqmodel", _GPTQ | {"sym": False, "format": "gptq_v2"}),
    Foreign("GPTQ 8 bit", "gptqmodel", _GPTQ | {"bits": 8}),
    Foreign("AWQ gemm", "gptqmodel", _GPTQ | {"method": "awq", "format": "gemm"}),
    *(
        Foreign(f"{scheme} in {form}", "auto-round", {}, scheme, form)
        for scheme, form in (
            ("W4A16", "auto_round"),
            ("W4A16", "auto_gptq"),
            ("W4A16", "auto_awq"),
            ("W2A16G64", "auto_round"),
            ("MXFP4", "auto_round"),
            ("MXFP8", "auto_round"),
            ("NVFP4", "auto_round"),
            ("NVFP4", "llm_compressor"),
            ("MXFP4", "llm_compressor"),
            ("FP8_STATIC", "auto_round"),
        )
    ),
    *(
        Foreign(name, "compressed-tensors", {"groups": _named(groups)})
        for name, groups in (
            ("pack-quantized 4 bit asym", [_group(4, size=32, sym=False)]),
            ("int-quantized 8 bit, tokens", [_group(8, input_activations=_TOKEN8)]),
            ("int-quantized 8 bit asym", [_group(8, sym=False, input_activations=_TOKEN8)]),
            (
                "int-quantized 8 bit, static asym activations",
                [_group(8, input_activations=_TENSOR8 | {"symmetric": False})],
            ),
            (
                "mixed groups: 4 bit mlp, 8 bit attention",
                [
                    _group(4, where="re:.*mlp.*", size=32),
                    _group(8, where="re:.*self_attn.*", input_activations=_TOKEN8),
                ],
            ),
            ("float-quantized 8 bit, static", [_FP8]),
        )
    ),
    Foreign(
        "float-quantized 8 bit, static, in float32",
        "compressed-tensors",
        {"groups": _named([_FP8]), "dtype": "float32"},
    ),
)


def main() -> None:
    """Make, run and compare what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--only", default="")
    for kind in ("auto-round", "gptqmodel", "compressed-tensors"):
        parser.add_argument(f"--{kind}", metavar="PYTHON")
    given = parser.parse_args()
    pythons = {"auto-round": given.auto_round, "gptqmodel": given.gptqmodel}
    pythons |= {"compressed-tensors": given.compressed_tensors}
    path = given.work / "foreign.json"
    given.work.mkdir(parents=True, exist_ok=True)
    outcomes = json.loads(path.read_text()) if path.is_file() else {}
    for case in CASES:
        # auto-round leaves these two to gptqmodel
        reader = "gptqmodel" if case.form in ("auto_gptq", "auto_awq") else case.by
        maker, runner = pythons[case.by], pythons[reader]
        if maker is None or runner is None or given.only not in case.name:
            continue
        found = _outcome(case, maker, (reader, runner), given)
        outcomes[case.name] = {"by": case.by, **found}
        print(case.name, outcomes[case.name], flush=True)
        path.write_text(json.dumps(outcomes, indent=1))
    if any(not o["outcome"].startswith(("same", "its own")) for o in outcomes.values()):
        sys.exit(1)


def _outcome(
    case: Foreign, maker: str, runner: tuple[str, str], given: argparse.Namespace
) -> dict[str, Any]:
    """Return what came of a case, in words; `runner` is (project, python) that gives logits."""
    folder = given.work / "".join(c if c.isalnum() else "_" for c in case.name)
    made, logits = folder / "made", folder / "logits.pt"
    try:
        if not made.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _make(case, maker, given.model, made, logits)
        root = next(made.rglob("config.json")).parent
        if not logits.is_file():
            _run(runner[1], "foreign_env.py", f"logits-{runner[0]}", root, logits)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = getattr(error, "stderr", None) or str(error)
        return {"outcome": f"its own route fails: {said.strip().splitlines()[-1][:120]}"}
    return _compared(root, logits)


def _make(case: Foreign, python: str, model: Path, out: Path, logits: Path) -> None:
    options = json.dumps(case.options)
    if case.by == "auto-round":
        _run(python, "peer.py", model, out, case.scheme, case.form, options)
    elif case.by == "compressed-tensors":
        _run(python, "compressed_env.py", model, out, options, logits)
    else:
        _run(python, "foreign_env.py", "make-gptqmodel", model, out, options)


def _run(python: str, script: str, *args: object) -> None:
    """Run a script beside this one in another environment; what it leaves lies in no repository."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["AR_KERNELS_TAKEOVER"] = "never"
    paths = [arg.absolute() if isinstance(arg, Path) else arg for arg in args]
    line = [python, str(HERE / script), *map(str, paths)]
    with tempfile.TemporaryDirectory() as here:
        subprocess.run(
            line, check=True, capture_output=True, text=True, timeout=LIMIT, env=env, cwd=here
        )


def _compared(path: Path, logits: Path) -> dict[str, Any]:
    """Return how far our logits are from theirs, and what runs in the model."""
    import torch
    from transformers import AutoModelForCausalLM

    import ar_kernels

    os.environ["AR_BACKEND"] = "dense"
    theirs = torch.load(logits)
    dtype = getattr(torch, theirs["dtype"].removeprefix("torch."))
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, output_loading_info=True
    )
    odd = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    layers = [m for m in model.modules() if isinstance(m, ar_kernels.QuantLinear)]
    kinds = sorted({f"{m.spec}" + (f" a {m.activation}" if m.activation else "") for m in layers})
    with torch.inference_mode():
        ours = model.eval()(torch.arange(48).reshape(2, 24)).logits.float()
    error = float((ours - theirs["logits"]).norm() / theirs["logits"].norm())
    same = "same" if error < SAME and not odd and layers else "differs"
    detail = f"; keys {odd[:3]}" if odd else ""
    return {
        "outcome": f"{same} ({error:.1e}){detail}",
        "layers": len(layers),
        "kinds": kinds,
        "dtype": theirs["dtype"],
    }


if __name__ == "__main__":
    main()
