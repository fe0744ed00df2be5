"""What is fitted on some images before others are judged."""
