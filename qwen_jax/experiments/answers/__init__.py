"""From records to an answer: which setting is better, by how much, and whether it may be luck."""
