"""A whole plugin for ar: a scheme, an algorithm and a command."""
