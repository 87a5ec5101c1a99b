"""A model applied to recordings of any length: tags over time, and embeddings."""
