"""What a layer can become: schemes, presets, layer rules, bit accounting, the plugin host.

Torch is never imported here: a scheme is data.
"""

from ar_schemes.errors import ArError, PluginError, SchemeError, unknown_name
from ar_schemes.hookspecs import hookimpl
from ar_schemes.plan import (
    SOURCE,
    LayerInfo,
    LayerPlan,
    LayerRules,
    PlanRow,
    make_plan,
    matches,
    settled,
)
from ar_schemes.plugins import HOSTS, PluginHost, PluginRecord, Registry
from ar_schemes.registry import host, scheme, schemes
from ar_schemes.scheme import FIELDS, Scheme, describe, scheme_from_dict
from ar_schemes.size import PlanSize
from ar_schemes.spec import Granularity, Span, SuperGroup, TensorSpec

__version__ = "0.1.0"

__all__ = [
    "FIELDS",
    "HOSTS",
    "SOURCE",
    "ArError",
    "Granularity",
    "LayerInfo",
    "LayerPlan",
    "LayerRules",
    "PlanRow",
    "PlanSize",
    "PluginError",
    "PluginHost",
    "PluginRecord",
    "Registry",
    "Scheme",
    "SchemeError",
    "Span",
    "SuperGroup",
    "TensorSpec",
    "describe",
    "hookimpl",
    "host",
    "make_plan",
    "matches",
    "scheme",
    "scheme_from_dict",
    "schemes",
    "settled",
    "unknown_name",
]
