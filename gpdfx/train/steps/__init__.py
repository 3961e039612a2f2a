"""The steps of a run: how one goes, how it runs, and what it costs."""
