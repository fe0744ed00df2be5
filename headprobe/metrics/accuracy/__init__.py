"""What a mask costs: paired counts of right answers, and the statistics of their differences."""
