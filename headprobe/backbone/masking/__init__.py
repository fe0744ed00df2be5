"""Taking heads away: the hooks, and what a masked slot is filled with."""
