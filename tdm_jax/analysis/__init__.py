"""What models cost and achieve: costs, timing, comparison, diversity, and their results."""
