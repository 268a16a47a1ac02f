"""The second file of a model that sees: its vision tower and projector, as libmtmd reads them."""
