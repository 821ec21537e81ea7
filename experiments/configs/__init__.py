"""One config per file: what was compared and why, the settings that differ, and its sweeps."""
