"""The rules for stored notebooks: what tests and `make validate` hold them to."""
