"""Runs read back for Python and notebooks: pandas tables, arrays and plots."""
