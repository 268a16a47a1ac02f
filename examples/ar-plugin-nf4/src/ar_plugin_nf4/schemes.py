"""What `ar schemes` gains. No torch here: a scheme is data."""

from __future__ import annotations

from ar_schemes import Scheme, hookimpl, scheme_from_dict


@hookimpl
def ar_register_schemes() -> list[Scheme]:
    """Return the scheme NF4: four bits from a codebook, one scale for 64 weights."""
    flat = {"data_type": "nf4", "bits": 4, "group_size": 64, "sym": True}
    return [scheme_from_dict(flat, name="NF4")]
