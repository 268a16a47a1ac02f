"""The embedded model and what `ar quantize --demo` does with it."""
