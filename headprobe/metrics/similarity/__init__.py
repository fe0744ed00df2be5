"""How alike heads are: moments of their outputs, and the measures that follow from them."""
