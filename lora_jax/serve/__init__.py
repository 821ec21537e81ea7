"""Finished runs and adapters put to use: loaded with their base, applied to new inputs."""
