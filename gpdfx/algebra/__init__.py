"""The axis algebra: what a dimension is made of, how wide it gets, and the gather that follows."""
