"""Alignment that also chooses the config, inside the launch."""
