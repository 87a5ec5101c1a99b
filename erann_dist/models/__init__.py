"""What is computed: the front end and the networks."""
