"""Methods around methods: one for each teacher, a draw among them, their ensemble, students that learn from each other."""
