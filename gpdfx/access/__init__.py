"""What a user reads out of a teacher, or of what holds one: student, states, groups."""
