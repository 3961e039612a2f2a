"""What ``expand`` did: the report, its costs, explanations and the picture."""
