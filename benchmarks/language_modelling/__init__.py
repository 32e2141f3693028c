"""TNL against other models on real text: quality, ablations, length, recall, speed and generation."""
