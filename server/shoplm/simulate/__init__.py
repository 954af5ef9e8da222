"""A fleet on simulated time: the real scheduler and step loop over a backend that only takes time. No torch."""
