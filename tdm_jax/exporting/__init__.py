"""Models that leave: programs that run without this library."""
