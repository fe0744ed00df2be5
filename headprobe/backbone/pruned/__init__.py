"""timm's attention modules with fewer heads, and models that are built of them."""
