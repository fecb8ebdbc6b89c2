"""Wrappers of methods: a copy for each teacher, a randomly drawn teacher, an ensemble of teachers, mutual learning."""
