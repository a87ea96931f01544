"""What runs on the host around a compiled kernel."""
