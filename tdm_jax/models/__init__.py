"""Vision transformers, and the table of those that go by a name."""
