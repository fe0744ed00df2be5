"""What `headprobe.module.HeadProbe` is made of: the model that is scored, its masks, and its stages."""
