"""Training runs: single runs, cross-validations and studies; evaluation and tagging with a trained model."""
