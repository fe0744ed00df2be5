"""Which of timm's architectures have heads, and what can be measured of them; nothing in a run uses it."""
