"""`ar doctor`: what this machine has, and what may go wrong on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from ar_cli.archiver import find_archiver
from ar_cli.commands.plugins import records_of
from ar_cli.output import json_option, print_json, print_table, size
from ar_cli.quiet import hush
from ar_schemes import HOSTS

_PACKAGES = (
    *("ar-schemes", "ar-kernels", "ar-tuner", "ar-export", "ar-vlm", "ar-cli"),
    *("torch", "transformers", "datasets", "safetensors", "gguf", "triton"),
)


@click.command()
@json_option
def doctor(as_json: bool) -> int:  # noqa: FBT001
    """Show versions, devices and the health of plugins; exit status 1 when something is wrong."""
    hush()
    facts = {"python": platform.python_version(), "system": platform.platform(), **_versions()}
    facts |= _machine()
    problems = _problems()
    if as_json:
        print_json({**facts, "problems": problems})
    else:
        print_table(("", ""), [(k, str(v)) for k, v in facts.items()])
        click.echo("\n" + ("\n".join(f"problem: {p}" for p in problems) or "no problems found"))
    return 1 if problems else 0


def _versions() -> dict[str, str]:
    out = {}
    for name in _PACKAGES:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def _machine() -> dict[str, Any]:
    import torch

    devices = ["cpu"]
    devices += [
        f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
    ]
    archiver = find_archiver(os.environ, Path(sys.argv[0]))
    return {
        "devices": ", ".join(devices),
        "cpu features": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory": size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "free in temporary folder": size(shutil.disk_usage(tempfile.gettempdir()).free),
        "archiver that `ar rcs` gets": archiver or "none on PATH",
    }


def _problems() -> list[str]:
    out = []
    for host in HOSTS:
        out += [
            f"plugin {r.name} of {r.dist} ({host}) is broken: {r.error}"
            for r in records_of(host)
            if r.status == "failed"
        ]
    if not os.access(tempfile.gettempdir(), os.W_OK):
        out.append(f"the temporary folder {tempfile.gettempdir()} is not writable")
    return out
