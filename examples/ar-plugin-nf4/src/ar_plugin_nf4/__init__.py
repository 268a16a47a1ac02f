"""4-bit NormalFloat for ar: a data type, a scheme, a bit layout, a backend and a format."""

__version__ = "0.1.0"
