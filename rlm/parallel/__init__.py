"""Work divided among devices."""
