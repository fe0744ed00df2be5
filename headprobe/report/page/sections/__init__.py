"""The sections of the page: each reads its own tables, and is left out where they are not there."""
