"""Mixed precision: what each layer gets, chosen by how much the model would lose."""
