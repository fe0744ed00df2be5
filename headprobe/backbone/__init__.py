"""What a timm model's heads are and how to reach them: finding, ablating, growing, proving."""
