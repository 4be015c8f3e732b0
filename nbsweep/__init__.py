"""Which notebooks there are, running them with other parameters, and the report of what came of
it."""
