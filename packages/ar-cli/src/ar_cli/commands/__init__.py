"""One module per command. At import they need click and ar-schemes only."""
