"""The page of a run: `report.html`, made from its files."""
