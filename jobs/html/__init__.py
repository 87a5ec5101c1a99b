"""What HTML pages and images have in common."""
