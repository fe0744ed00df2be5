"""Ink: tables and figures made from a run's files, without torch, Lightning or timm."""
