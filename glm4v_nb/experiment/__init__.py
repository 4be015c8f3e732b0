"""Running the suite: which notebooks there are, executing them in order, and the report of a run."""
