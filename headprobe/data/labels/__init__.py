"""From a dataset's labels to the model's class numbers."""
