"""Of a check that failed: where student and teacher part, and what Python does there."""
