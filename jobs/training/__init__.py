"""Training runs: one, a cross-validation, the grids of a study; and what follows from a trained model."""
