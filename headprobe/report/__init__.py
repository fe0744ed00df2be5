"""Ink: tables and figures made of a run's rows; knows nothing of Lightning or timm."""
