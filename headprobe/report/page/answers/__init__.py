"""The sentences that answer "What does the multi-head do?", by what they are about."""
