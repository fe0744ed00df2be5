"""The page `report.html`: a run's answer and every figure of it in one file, made from the run's files."""
