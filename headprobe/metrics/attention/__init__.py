"""How far, how sharply and at what heads look: attention weights to sums over images."""
