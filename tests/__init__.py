"""The proofs (DESIGN 14). A package so that tests can import `tests.support`, whatever else is on the path."""
