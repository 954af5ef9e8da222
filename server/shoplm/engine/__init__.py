"""The step loop and the process boundary."""
