"""What a step would take on hardware that is not here."""
