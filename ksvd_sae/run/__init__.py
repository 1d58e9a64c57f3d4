"""Many trainings and measurements on a grid, as rows that a stopped study goes on from."""
