"""Success rates that can be believed: one rollout loop for every environment, honest intervals, a report."""
