"""The same masks in several runs: on other data, or in another model of the same head layout."""
