"""How work reaches machines: launchers and the embedded Ray cluster."""
