"""The models: the front end and the networks."""
