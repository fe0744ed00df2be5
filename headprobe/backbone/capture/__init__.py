"""What a layer did in a forward pass, handed over while the model runs; nothing is kept."""
